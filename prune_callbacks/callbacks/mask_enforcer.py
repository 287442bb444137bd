"""MaskEnforcer: keeps pruned weights exactly zero while a model is trained."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.anatomy.targets import SPARSE, find_targets, matrices, parameters_of
from prune_callbacks.callbacks.kinds import HoldsMasks
from prune_callbacks.callbacks.lightning_internals import logs_now
from prune_callbacks.callbacks.lineup import Lineup, access_to
from prune_callbacks.callbacks.lost_process import LostProcessWatch
from prune_callbacks.parallel.access import ParamAccess, parameter_places
from prune_callbacks.parallel.strategies import masks_of_zeros, stepping_optimizers
from prune_callbacks.sparsity import MaskSet


class MaskEnforcer(HoldsMasks):
    """
    Holds masks on gradients, weights and optimizer state, so that zeros stay zero through every step.

    - Gradients of pruned weights are zeroed before clipping, so they do not enter the clipping norm.
    - Pruned weights are zeroed after every optimizer step, by a hook of the optimizer, in any training loop.
    - The optimizer's moments of pruned weights are zeroed when masks are set or change. Otherwise earlier momentum
      would move the weights for many more steps.

    The masks are those of `IterativePrune` or `OneShotPrune` in the same trainer, else `masks`, else the zeros of the
    model's linear layers, routers and experts. The checkpoint contains the masks, and a resumed fit starts with them.

    Args:
        masks: a `MaskSet`, or the path of a file that `MaskSet.save` wrote.

    Attributes:
        masks: the `MaskSet` in force, once training has started.
        weights: the access to the masked parameters, once training has started; other callbacks use it too.
        given: the argument `masks`; once a fit has begun, a path is replaced by the masks in the file.
    """

    def __init__(self, masks: MaskSet | str | Path | None = None) -> None:
        self.given = masks
        self.masks: MaskSet | None = None
        self._restored: MaskSet | None = None
        self.weights: ParamAccess | None = None
        self._hooks: list[RemovableHandle] = []
        self._watch: LostProcessWatch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._release()  # Lightning calls no teardown after a fit that failed
        Lineup(trainer).check(self)
        if isinstance(self.given, str | Path):
            self.given = MaskSet.load(self.given)
        if self.given is not None:
            parameter_places(self.given, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: some strategies load a checkpoint (and with it these masks) after on_fit_start.
        # The masks of IterativePrune, which comes before this callback, take precedence, after a resume too.
        decided = Lineup(trainer).masks_of_rounds()
        decided = self._restored if decided is None else decided
        self.hold(self._find_masks(trainer, pl_module) if decided is None else decided, trainer)
        self._hooks = [o.register_step_post_hook(self._after_step) for o in stepping_optimizers(trainer)]
        self._watch = LostProcessWatch(trainer)

    def hold(self, masks: MaskSet, trainer: Trainer) -> None:
        """Sets the masks in force in a running fit: zeroes pruned weights and their optimizer moments."""
        self.masks = masks
        self.weights = access_to(trainer, masks)
        self.weights.project()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.weights is not None
        self.weights.mask_gradients()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self.weights is not None
        self.weights.after_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logs_now(trainer):
            self._log(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        assert self.weights is not None
        assert self.masks is not None
        violations = sum(self.weights.violations().values())
        pl_module.log_dict({"sparsity": self.masks.sparsity(), "violations": float(violations)}, sync_dist=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._watch is not None:
            self._watch.note(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.masks is None else {"masks": self.masks.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._restored = MaskSet.from_state_dict(state_dict["masks"])

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._watch is not None:
            self._watch.end()
        self._watch = None
        self.weights = None
        self._restored = None

    def _find_masks(self, trainer: Trainer, pl_module: LightningModule) -> MaskSet:
        """Returns the masks of OneShotPrune, the given masks, or the zeros of the model; ValueError without a zero."""
        pruned = Lineup(trainer).one_shot_report()
        if pruned is not None:
            if self.given is not None:
                rank_zero_warn("MaskEnforcer uses the masks of OneShotPrune; its own argument masks= is not used")
            return pruned.masks
        if self.given is not None:
            assert isinstance(self.given, MaskSet)
            return self.given
        blocks = find_blocks(find_language_model(pl_module))
        layers = find_targets(blocks, experts=True)
        zeros = masks_of_zeros(trainer, matrices(blocks), find_language_model(pl_module))
        # Routers and experts of an unknown kind stay dense by default, but may have been pruned elsewhere.
        known, sparsity = parameters_of(layers.values()), zeros.layer_sparsity()
        held = [name for name in zeros if name in known or sparsity[name] >= SPARSE]
        masks = MaskSet.join(MaskSet({name: zeros[name]}) for name in held)
        if masks.sparsity() == 0:
            raise ValueError(
                "MaskEnforcer found no masks: there is no OneShotPrune among the callbacks, masks= was not given, and "
                f"none of the {len(layers)} linear layers in the decoder blocks holds a zero"
            )
        report = rank_zero_info if masks.sparsity() >= SPARSE else rank_zero_warn
        report(f"MaskEnforcer holds the zeros of the model: {masks.sparsity():.2%} of {len(masks)} layers")
        return masks
