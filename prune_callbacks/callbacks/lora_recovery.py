"""LoRARecovery: recovers a sparse model by low-rank updates, its own weights frozen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from prune_callbacks.calibration import find_blocks, find_language_model, find_targets, savable
from prune_callbacks.callbacks.iterative_prune import IterativePrune
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.callbacks.trainer_state import resumed_checkpoint
from prune_callbacks.sparsity import MaskSet

if TYPE_CHECKING:  # an extra
    from peft import LoraConfig, PeftModel


class LoRARecovery(Callback):
    """
    Puts LoRA layers (peft) on the pruned layers when a fit begins, and freezes everything else.

    Stands after `OneShotPrune`, if there is one; without one, the model must be sparse already.

    - `masked=True`: the update is zero wherever the base is, in every forward pass. It is merged when training ends:
      the model is a plain sparse model again, with every zero in its place. (A checkpoint written after that, such as
      the `last.ckpt` of the end of training, is one of the merged model.)
    - `masked=False`: plain LoRA. The base stays sparse and the adapter stays an adapter, saved to `save_dir/adapter`;
      merging would fill the zeros (`prune_callbacks.adapters.merge_lora` says what that costs).

    Args:
        config: peft's; `target_modules` may name pruned layers only, None means all of them. None: `LoraConfig()`.
        masked: see above.
        save_dir: where a plain adapter is saved when training ends; None: nowhere.

    Attributes:
        peft_model: peft's wrapper around the model, while it has LoRA layers.
    """

    def __init__(
        self, config: LoraConfig | None = None, *, masked: bool = True, save_dir: str | Path | None = None
    ) -> None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError("LoRARecovery needs peft: pip install prune-callbacks[lora]") from error
        self.config = LoraConfig() if config is None else config
        self.masked = masked
        self.save_dir = save_dir
        self.peft_model: PeftModel | None = None
        self._trained: dict[str, bool] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        from prune_callbacks.adapters import add_lora

        if any(isinstance(callback, IterativePrune) for callback in trainer.callbacks):
            raise ValueError(
                "LoRARecovery freezes the weights that IterativePrune chooses from; prune first, and recover in a fit "
                "of its own"
            )
        model = savable(find_language_model(pl_module))
        self._trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.peft_model = add_lora(model, self._pruned(trainer, model), self.config, masked=self.masked)
        trained, total = self.peft_model.get_nb_trainable_parameters()
        rank_zero_info(f"LoRA{' under the mask' if self.masked else ''}: {trained:,} of {total:,} weights are trained")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.peft_model is not None
        if self.masked:
            from prune_callbacks.adapters import merge_lora

            model = self.peft_model.get_base_model()
            weights = {name: p for name, p in model.named_parameters() if name.endswith(".base_layer.weight")}
            merge_lora(self.peft_model, MaskSet.from_nonzero(weights))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self._trained[name])
            self.peft_model = None
        elif self.save_dir is not None and trainer.is_global_zero:
            self.peft_model.save_pretrained(str(Path(self.save_dir) / "adapter"))

    def _pruned(self, trainer: Trainer, model: nn.Module) -> list[str]:
        one_shot = next((c for c in trainer.callbacks if isinstance(c, OneShotPrune)), None)
        after = trainer.callbacks[trainer.callbacks.index(self) :]
        if one_shot in after:
            raise ValueError(
                "LoRARecovery must stand after OneShotPrune among the callbacks: it adapts what was pruned"
            )
        if one_shot is not None and one_shot.report is not None:
            return [name.removesuffix(".weight") for name in one_shot.report.masks]
        if one_shot is not None and resumed_checkpoint(trainer) is not None:
            # Weights, and with them the zeros, come with the checkpoint.
            return list(find_targets(find_blocks(model, one_shot.blocks), one_shot.targets))
        layers = find_targets(find_blocks(model))
        sparse = [name for name, layer in layers.items() if (layer.get_parameter("weight") == 0).any()]
        if not sparse:
            raise ValueError(
                f"LoRARecovery found no pruned layer: there is no OneShotPrune before it among the callbacks, and none "
                f"of the {len(layers)} linear layers in the decoder blocks holds a zero"
            )
        return sparse
