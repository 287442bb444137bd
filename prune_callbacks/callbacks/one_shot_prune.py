"""OneShotPrune: prunes a model when a fit begins."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from prune_callbacks.allocation.measuring import check_allocation
from prune_callbacks.allocation.protocol import Allocation
from prune_callbacks.calibration.texts import language_model
from prune_callbacks.callbacks.built_later import files_of
from prune_callbacks.callbacks.calibration_batches import check_counts
from prune_callbacks.callbacks.kinds import PrunesOnce, renamed
from prune_callbacks.callbacks.lightning_internals import logs_now, makes_in_setup, resumed_checkpoint
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.mask_enforcer import MaskEnforcer
from prune_callbacks.callbacks.model_in_setup import layer_names, model_in_setup, refuse_later_layers
from prune_callbacks.callbacks.one_shot_settings import OneShotSettings
from prune_callbacks.callbacks.own_step import Forward
from prune_callbacks.callbacks.prune_files import back_to_source, begin_trial, prune_files, refuse_whole
from prune_callbacks.callbacks.prune_module import prune_module
from prune_callbacks.engine.fitting import check_reconstructible
from prune_callbacks.engine.report import PruneReport
from prune_callbacks.engine.sequential import Order, check_order
from prune_callbacks.pruners import Pruner, check_pruner
from prune_callbacks.reconstruction.report import described
from prune_callbacks.reconstruction.settings import BlockReconstruction
from prune_callbacks.storage.model_folder import check_savable


class OneShotPrune(PrunesOnce):
    """
    Prunes the module's model in `setup(stage="fit")`, before the strategy wraps it.

    Equivalent to `prune_sequentially` of the model: of the model of `transformers` in the module, else of the module. A
    model of transformers is calibrated by its forward, which gets of a batch what it accepts. Any other module runs its
    own `training_step` (under manual optimization `validation_step`), in evaluation mode, without gradients; what it
    logs is dropped, and random states, buffers and other attributes are as before afterwards.

    A model that its module builds later from files, as `CausalLM(path=...)` does, is pruned from files into files by
    `prune_checkpoint`, in the memory of two blocks, and the module then builds the pruned one. Pruned files that are
    there already, also of a fit that was killed, are used.

    The model keeps its parameters, their names and its `state_dict` keys; pruned weights are zeros. Add
    `MaskEnforcer()`, or the first optimizer steps overwrite the zeros.

    A fit that resumes from a checkpoint (`ckpt_path=`) does not prune again. It takes weights and masks from the
    checkpoint. Several ranks share the calibration batches and the layers.

    Args:
        pruner: the pruner, with its pattern, e.g. `SparseGPT(Unstructured(0.5))`.
        batches: calibration batches: token ids, or mappings of arguments of the model's forward, such as `input_ids`,
            `attention_mask` or `pixel_values`; keys that it does not accept are named in a warning. For other modules,
            and with `forward`, batches as their step takes them. None: the data module's `calibration_dataloader()`,
            else the training data.
        num_batches: how many batches to use; an error if there are fewer. None: all of `batches` or
            `calibration_dataloader()`, or the first 128 batches of the training data.
        written_windows: how many more windows the dense model writes itself, as a whole on the trainer's device; see
            `write_windows`. A trial run writes none.
        targets: patterns of layer names, e.g. `["*.mlp.*"]`; None for those that `prune_sequentially` takes.
        blocks: the name of the list of blocks, or of several, where they cannot be found.
        forward: a function of module and batch, which runs the module's model on the batch; None: as above.
        order: "sequential" or "at_once"; see `prune_sequentially`.
        allocation: spreads the pattern's sparsity over the layers, with the same total: `MeasuredAllocation()`,
            `OWL()`, `LagrangianAllocation()`, `SensitivityAllocation(...)`; None: the same in every layer.
        reconstruction: trains the kept weights of every block right after pruning, towards the dense block's outputs;
            None: blocks stay as the pruner leaves them. It needs decoder blocks that form a chain.
        dirpath: the folder to write the pruned model (`model/`, by `save_pretrained`) and its masks
            (`masks.safetensors`) into right after pruning, so that a later failure does not lose them; None: not saved.
            A model that is built later is pruned into its `pruned`; None: into that of the trainer's default_root_dir.
        min_expert_tokens: an expert that fewer calibration tokens reach is pruned by Magnitude, with a warning.
        progress: show a progress bar.
        save_dir: the old name of `dirpath`.

    Attributes:
        report: the `PruneReport`; None before pruning. A resumed fit takes it from the checkpoint.
        files: the folder of the pruned files, of a model that is built later; else None.

    Raises:
        ValueError: `pruner` is no pruner, `num_batches` is below 1, the allocation does not support the pruner, or
            windows are to be written where nothing uses them.
    """

    def __init__(
        self,
        pruner: Pruner,
        batches: Iterable[Any] | None = None,
        *,
        num_batches: int | None = None,
        written_windows: int = 0,
        targets: Sequence[str] | str | None = None,
        blocks: str | Sequence[str] | None = None,
        forward: Forward | None = None,
        order: Order = "sequential",
        allocation: Allocation | None = None,
        reconstruction: BlockReconstruction | None = None,
        dirpath: str | Path | None = None,
        min_expert_tokens: int = 32,
        progress: bool = True,
        save_dir: str | Path | None = None,
    ) -> None:
        check_pruner("OneShotPrune", pruner)
        check_order(order)
        if allocation is not None:
            check_allocation(allocation, pruner)
        check_reconstructible("OneShotPrune", reconstruction, pruner, order)
        self.pruner = pruner
        self.allocation = allocation
        self.reconstruction = reconstruction
        self.batches = batches
        self.num_batches = num_batches
        self.written_windows = written_windows
        self.targets = targets
        self.blocks = blocks
        self.forward = forward
        self.order = order
        self.dirpath = renamed("OneShotPrune", "save_dir", save_dir, "dirpath", dirpath)
        self.min_expert_tokens = min_expert_tokens
        self.progress = progress
        self.report: PruneReport | None = None
        self.files: Path | None = None
        self._restored = False
        self._layers: set[str] | None = None
        calibrated = OneShotSettings.of(self).calibrated
        check_counts(num_batches, written_windows, calibrated=calibrated, own=forward is not None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not Lineup(trainer).begins_fit(self, stage):
            return
        self.report, self.files, self._restored = None, None, False
        if resumed_checkpoint(trainer) is not None:
            return  # the checkpoint has weights and masks; on_train_start checks that
        if not Lineup(trainer).has(MaskEnforcer):
            rank_zero_warn(
                "OneShotPrune without MaskEnforcer: the zeros will not last, since the first optimizer steps "
                "overwrite them. Add MaskEnforcer() to the callbacks."
            )
        settings, source = OneShotSettings.of(self), files_of(pl_module)
        now = settings if Lineup(trainer).trial() is None else settings.for_trial()
        if source is None:
            self.report = self._in_memory(trainer, pl_module, now)
        else:
            refuse_whole(pl_module, settings)
            self.files = self._folder(trainer, pl_module)
            self.report = prune_files(trainer, pl_module, source, self.files, now)
        rank_zero_info(
            f"pruned {len(self.report.layers)} layers, {self.report.sparsity:.2%} zeros, in {self.report.seconds:.0f} s"
        )
        if self.report.reconstruction:
            rank_zero_info(described(self.report.reconstruction))

    def _in_memory(self, trainer: Trainer, pl_module: LightningModule, settings: OneShotSettings) -> PruneReport:
        model = model_in_setup("OneShotPrune", pl_module, self.blocks)
        if self.written_windows:
            language_model("OneShotPrune(written_windows=...)", model)
        if self.dirpath is not None:
            check_savable(model)
        self._layers = layer_names(pl_module, self.blocks) if makes_in_setup(pl_module) else None
        return prune_module(trainer, pl_module, model, settings)

    def _folder(self, trainer: Trainer, pl_module: LightningModule) -> Path:
        """Returns the folder for the pruned files; of a trial run one that is removed when the fit ends."""
        folder = Path(self.dirpath or trainer.default_root_dir) / "pruned"
        if Lineup(trainer).trial() is None:
            Lineup(trainer).after_all().undo = back_to_source(pl_module)
            return folder
        folder = folder.with_name("pruned.trial")
        Lineup(trainer).after_all().undo = begin_trial(trainer, pl_module, folder)
        return folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is not None and self._layers is not None:
            refuse_later_layers("OneShotPrune", pl_module, self.blocks, self._layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None and not self._restored:
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} holds no pruning result, so it was written before pruning, or "
                "without OneShotPrune. To prune its model, load it and start a new fit without ckpt_path"
            )
        assert self.report is not None
        if self.report.scales:
            rank_zero_warn(
                f"{type(self.pruner).__name__} has rounded the weights, and training moves them off their grid, so "
                "they can no longer be stored as integer codes. Prune without quantizing and add QuantizeWeights last"
            )
        if trainer.loggers:
            metrics = {"sparsity": self.report.sparsity, "violations": self._violations(trainer)}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer):
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # MaskEnforcer logs the same; without it, these values show how the zeros are lost.
        if not Lineup(trainer).has(MaskEnforcer):
            assert self.report is not None
            metrics = {"sparsity": self.report.sparsity, "violations": float(self._violations(trainer))}
            pl_module.log_dict(metrics, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.report is None else self.report.state_dict() | {"pruner": repr(self.pruner)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._restored = True
            if state_dict["pruner"] != repr(self.pruner):
                rank_zero_warn(
                    f"the checkpoint was pruned by {state_dict['pruner']}, whose masks stay in force; "
                    f"{self.pruner} is not used"
                )
            self.report = PruneReport.from_state_dict(state_dict)

    def _violations(self, trainer: Trainer) -> int:
        assert self.report is not None
        return sum(Lineup(trainer).weights(self.report.masks).violations().values())
