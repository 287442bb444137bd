"""LoRARecovery: recovers a sparse model by low-rank updates; its own weights are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.anatomy.targets import SPARSE, find_targets, sparse_experts
from prune_callbacks.callbacks.built_later import files_of
from prune_callbacks.callbacks.kinds import FinishesWeights, PrunesOnce, renamed
from prune_callbacks.callbacks.lightning_internals import resumed_checkpoint
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.writing import replaced_folder

if TYPE_CHECKING:  # an extra
    from peft import LoraConfig, PeftModel

    from prune_callbacks.adapters.plain_state import PlainState


class LoRARecovery(FinishesWeights):
    """
    Adds LoRA layers (peft) to the pruned layers when a fit begins, and freezes all other weights.

    Put it after `OneShotPrune`, if there is one. Without `OneShotPrune` the model must be sparse already.

    - `masked=True`: the update is zero wherever the base weight is zero, in every forward pass. The update is merged
      when training ends. The result is a plain sparse model with the same zeros. So is the `state_dict` of every
      checkpoint, into which the update is merged: it loads into the module without LoRA layers. A fit that resumes
      takes the LoRA layers from this callback's state in the checkpoint.
    - `masked=False`: plain LoRA. The base stays sparse, and the adapter is not merged but saved to `dirpath/adapter`.
      Merging it would fill the zeros; see `prune_callbacks.adapters.merge_lora` for the cost.

    Args:
        config: peft's configuration. Its `target_modules` may name pruned layers only, and None means all of them.
            None: `LoraConfig()`.
        masked: see above.
        blocks: name of the list of decoder blocks, where it cannot be found; used only to look for zeros.
        dirpath: the folder to save a plain adapter into when training ends; None: it is not saved.
        save_dir: the old name of `dirpath`.

    Attributes:
        peft_model: peft's wrapper around the model, while it has LoRA layers.

    Raises:
        ValueError: peft is missing, `config` is no `LoraConfig` or has unsupported options, or `dirpath` is given with
            `masked=True`.
    """

    needs_whole_weights = True

    def __init__(
        self,
        config: LoraConfig | None = None,
        *,
        masked: bool = True,
        blocks: str | None = None,
        dirpath: str | Path | None = None,
        save_dir: str | Path | None = None,
    ) -> None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError("LoRARecovery needs peft: pip install prune-callbacks[lora]") from error
        if config is not None and not isinstance(config, LoraConfig):
            raise ValueError(f"LoRARecovery: config is a peft.LoraConfig, got {config!r}")
        dirpath = renamed("LoRARecovery", "save_dir", save_dir, "dirpath", dirpath)
        if masked and dirpath is not None:
            raise ValueError("LoRARecovery: dirpath is for the adapter of masked=False; a masked one is merged")
        from prune_callbacks.adapters import check_options

        self.config = LoraConfig() if config is None else config
        check_options(self.config, masked)
        self.masked = masked
        self.blocks = blocks
        self.dirpath = dirpath
        self.peft_model: PeftModel | None = None
        self._trained: list[tuple[nn.Parameter, bool]] = []
        self._unfinished = False
        self._state: PlainState | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not Lineup(trainer).begins_fit(self, stage):
            return
        from prune_callbacks.adapters import add_lora
        from prune_callbacks.adapters.plain_state import PlainState

        model = find_language_model(pl_module)
        if not isinstance(model, PreTrainedModel):
            later = ", whose model is built later: build it in __init__" if files_of(pl_module) else ""
            raise ValueError(f"LoRARecovery adapts models of transformers, got {type(model).__name__}{later}")
        if self.peft_model is not None and self._unfinished:  # the previous fit failed without a teardown
            self._plain_names()
            self.peft_model.unload()
        self._unfinished = True
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        layers = self._saved_layers(trainer)
        pruned = self._pruned(trainer, model) if layers is None else list(layers["weights"])
        self.peft_model = add_lora(model, pruned, self.config, masked=self.masked)
        if self.masked:
            self._state = PlainState(model)
            if layers is not None:
                self._state.restore(layers)
        trained, total = self.peft_model.get_nb_trainable_parameters()
        rank_zero_info(f"LoRA{' under the mask' if self.masked else ''}: {trained:,} of {total:,} weights are trained")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finish(trainer)  # a fit resumed at its last step has no on_train_end

    def finish(self, trainer: Trainer) -> None:
        """Merges the masked update, or saves the plain adapter; does nothing when called again in the same fit."""
        if not self._unfinished:
            return
        assert self.peft_model is not None
        self._unfinished = False
        self._plain_names()
        if self.masked:
            from prune_callbacks.adapters import merge_lora

            model = self.peft_model.get_base_model()
            weights = {name: p for name, p in model.named_parameters() if name.endswith(".base_layer.weight")}
            merge_lora(self.peft_model, MaskSet.from_nonzero(weights))
            self._thaw()
        elif Lineup(trainer).trial() is not None:
            self.peft_model.unload()
            self._thaw()
        elif self.dirpath is None:
            rank_zero_warn("LoRARecovery(masked=False) without dirpath: the adapter is in the model only, not saved")
        elif trainer.is_global_zero:
            base = Path(self.dirpath) / "model"
            if base.exists():
                self.peft_model.peft_config["default"].base_model_name_or_path = str(base)
            with replaced_folder(Path(self.dirpath) / "adapter") as partial:
                self.peft_model.save_pretrained(str(partial))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if Lineup(trainer).trial() is not None and self.peft_model is not None and self._unfinished:
            self._unfinished = False
            self._plain_names()
            self.peft_model.unload()
            self._thaw()

    def _thaw(self) -> None:
        """Trains again what was trained before, now that there are no LoRA layers."""
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        self.peft_model = None

    def _plain_names(self) -> None:
        """Gives the model back its own `state_dict`."""
        if self._state is not None:
            self._state.remove()
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        layers = {} if self._state is None else {"layers": self._state.layers()}
        return {"masked": self.masked, "config": self._settings()} | layers

    def _settings(self) -> dict[str, str]:
        """Returns the settings of the update, as text."""
        names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
        found = {name: getattr(self.config, name) for name in names}
        return {n: repr(sorted(v) if isinstance(v, set | list | tuple) else v) for n, v in found.items()}

    def _saved_layers(self, trainer: Trainer) -> dict[str, Any] | None:
        """
        Returns the LoRA layers in the checkpoint that the fit resumes from; None if it has none in this form.

        Raises:
            ValueError: the checkpoint was trained with layers of another kind or configuration.
        """
        checkpoint = resumed_checkpoint(trainer)
        if checkpoint is None:
            return None
        saved = trainer.strategy.load_checkpoint(checkpoint).get("callbacks", {}).get(self.state_key, {})
        if saved.get("masked", self.masked) != self.masked:
            raise ValueError(
                f"the checkpoint was trained by LoRARecovery(masked={saved['masked']}); resume with the same"
            )
        before, now = saved.get("config", {}), self._settings()
        changed = [f"{name}={value}, and this is {now[name]}" for name, value in before.items() if now[name] != value]
        if changed:
            raise ValueError(
                f"the checkpoint was trained by LoraConfig with {'; '.join(changed)}; resume with the same"
            )
        layers: dict[str, Any] | None = saved.get("layers")
        return layers

    def _pruned(self, trainer: Trainer, model: nn.Module) -> list[str]:
        """Returns the names of the pruned linear layers: from the checkpoint, from OneShotPrune, or by their zeros."""
        one_shot = Lineup(trainer).first(PrunesOnce)
        checkpoint = resumed_checkpoint(trainer)
        if checkpoint is not None:  # it is loaded later, so the weights have no zeros yet
            saved = trainer.strategy.load_checkpoint(checkpoint)
            adapted = {name.partition(".lora_A.")[0] for name in saved["state_dict"] if ".lora_A." in name}
            if "callbacks" not in saved:
                raise ValueError(
                    f"the checkpoint {checkpoint} holds weights alone (save_weights_only=True): no fit can resume from "
                    "it. Load its weights into the module and start a new fit without ckpt_path"
                )
            if not adapted:
                raise ValueError(
                    f"the checkpoint {checkpoint} holds no LoRA layers: it was written after their update was merged, "
                    "or without LoRARecovery. Load its weights into the module and start a new fit without ckpt_path"
                )
            return [n for n, _ in model.named_modules() if any(a == n or a.endswith(f".{n}") for a in adapted)]
        if one_shot is not None:
            assert one_shot.report is not None
            experts = [name for name in one_shot.report.masks if not name.endswith(".weight")]
            _leave(experts, only=len(experts) == len(one_shot.report.masks))
            return [name.removesuffix(".weight") for name in one_shot.report.masks if name not in experts]
        blocks = find_blocks(model, self.blocks)
        layers = find_targets(blocks)
        weights = {name: target.parameter for name, target in layers.items()}
        sparse = [name for name, zeros in MaskSet.from_nonzero(weights).layer_sparsity().items() if zeros >= SPARSE]
        _leave(list(sparse_experts(blocks)), only=not sparse)
        if not sparse:
            raise ValueError(
                "LoRARecovery found no pruned layer: there is no OneShotPrune before it among the callbacks, and none "
                f"of the {len(layers)} linear layers in the decoder blocks has 1 % of zeros"
            )
        return sparse


def _leave(experts: Sequence[str], only: bool) -> None:
    """Warns that tensors of experts get no LoRA layers; raises ValueError if nothing else is pruned."""
    if experts and only:
        raise ValueError(
            f"LoRARecovery found no pruned linear layer: only experts are pruned, {len(experts)} tensors, first "
            f"{experts[0]}, and they get no LoRA layers. Recover them by training under MaskEnforcer() instead"
        )
    if experts:
        rank_zero_warn(
            f"LoRARecovery: {len(experts)} tensors of experts, first {experts[0]}, get no LoRA layers: only "
            "linear layers do. The experts stay as they were pruned"
        )
