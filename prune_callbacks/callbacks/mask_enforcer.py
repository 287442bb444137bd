"""MaskEnforcer: keeps pruned weights exactly zero while a model is trained."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.anatomy.stages import find_stages, prunable_weights, stage_targets
from prune_callbacks.anatomy.targets import SPARSE, parameters_of
from prune_callbacks.callbacks.kinds import HoldsMasks
from prune_callbacks.callbacks.lightning_internals import logs_now
from prune_callbacks.callbacks.lineup import Lineup, access_to
from prune_callbacks.callbacks.lost_process import LostProcessWatch
from prune_callbacks.callbacks.zeros import masks_from_zeros
from prune_callbacks.parallel.access import ParamAccess, parameter_places
from prune_callbacks.parallel.strategies import sharded, stepping_optimizers
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.sparsity.parameter_names import unwrapped


class MaskEnforcer(HoldsMasks):
    """
    Holds masks on gradients, weights and optimizer state, so that zeros stay zero through every step.

    - Gradients of pruned weights are zeroed before clipping, so they do not enter the clipping norm.
    - Pruned weights are zeroed after every optimizer step, by a hook of the optimizer, in any training loop.
    - The optimizer's moments of pruned weights are zeroed when masks are set or change. Otherwise earlier momentum
      would move the weights for many more steps.

    The masks are those of `IterativePrune` or `OneShotPrune` in the same trainer, else `masks`, else the zeros of the
    model's linear layers, routers and experts. The checkpoint contains the masks, and a resumed fit starts with them.

    Averages of the weights that Lightning's `WeightAveraging` (EMA) and `StochasticWeightAveraging` keep, or torch's
    `AveragedModel` in a callback or in the module, get the masks too. When the fit has ended, after every other
    callback, the zeros of the module are counted once more.

    Args:
        masks: a `MaskSet`, or the path of a file that `MaskSet.save` wrote.
        blocks: the name of the list of blocks, or of several, where they cannot be found; used to look for zeros only.

    Attributes:
        masks: the `MaskSet` in force, once training has started.
        weights: the access to the masked parameters, once training has started; other callbacks use it too.
        given: the argument `masks`; once a fit has begun, a path is replaced by the masks in the file.

    Raises:
        ValueError: when the fit has ended: a pruned weight is not zero, although it was after the last optimizer step.
    """

    def __init__(self, masks: MaskSet | str | Path | None = None, *, blocks: str | Sequence[str] | None = None) -> None:
        self.given = masks
        self.blocks = blocks
        self.masks: MaskSet | None = None
        self._restored: MaskSet | None = None
        self.weights: ParamAccess | None = None
        self._hooks: list[RemovableHandle] = []
        self._watch: LostProcessWatch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not Lineup(trainer).begins_fit(self, stage):
            return
        self._release()  # Lightning calls no teardown after a fit that failed
        if isinstance(self.given, str | Path):
            self.given = MaskSet.load(self.given)
        if self.given is not None and next(pl_module.parameters(), None) is not None:  # else they are made later
            parameter_places(self.given, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: some strategies load a checkpoint (and with it these masks) after on_fit_start.
        # The masks of IterativePrune, which comes before this callback, take precedence, after a resume too.
        decided = Lineup(trainer).masks_of_rounds()
        decided = self._restored if decided is None else decided
        self.hold(self._find_masks(trainer, pl_module) if decided is None else decided, trainer)
        self._hooks = [o.register_step_post_hook(self._after_step) for o in stepping_optimizers(trainer)]
        self._watch = LostProcessWatch(trainer)
        self._come_last(trainer, pl_module)

    def _come_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Arranges the last check of the module and of every checkpoint, after all other callbacks."""
        if sharded(trainer.strategy):
            return  # no process has whole weights; `on_train_end` checks
        last = Lineup(trainer).after_all()
        last.check = lambda: self._check_handed_back(trainer, pl_module)
        last.on_checkpoint = lambda checkpoint: self._mask_checkpoint(trainer, pl_module, checkpoint)

    def _mask_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Zeroes pruned weights in a checkpoint where a callback put other weights than the module's; warns of it."""
        assert self.masks is not None
        places, wrong = parameter_places(self.masks, pl_module), 0
        for state in (checkpoint.get(key, {}) for key in ("state_dict", "current_model_state")):
            for name, place in places.items():
                here = next((key for key in (place, unwrapped(place)) if key in state), None)
                if here is None or tuple(state[here].shape) != self.masks.shape(name):
                    continue
                removed = ~self.masks[name].to(state[here].device)
                count = int((state[here] != 0).logical_and_(removed).count_nonzero())
                if count:
                    state[here] = state[here].masked_fill(removed, 0)
                    wrong += count
        if wrong:
            rank_zero_warn(
                f"MaskEnforcer: a checkpoint had {wrong} pruned weights that are not zero; they are zero in the file. "
                f"{self._writers(trainer)}"
            )

    def _check_handed_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError if a pruned weight of the module is not zero when the fit has ended."""
        masks = self.masks
        assert masks is not None
        plain = {n: p for n, p in pl_module.named_parameters() if type(p.data) in (Tensor, nn.Parameter)}
        try:
            # Weights converted for a kernel are no plain tensors; their zeros are part of the format.
            here = [name for name, place in parameter_places(masks, pl_module).items() if place in plain]
            wrong = MaskSet.join(MaskSet({name: masks[name]}) for name in here).violations(plain)
        except ValueError as error:
            rank_zero_warn(f"MaskEnforcer could not count the zeros when the fit had ended: {error}")
            return
        if wrong:
            layers = ", ".join(f"{name} ({count})" for name, count in list(wrong.items())[:3])
            raise ValueError(
                f"MaskEnforcer: {sum(wrong.values())} pruned weights are not zero in the module that the fit hands "
                f"back, in {len(wrong)} layers, first {layers}. {self._writers(trainer)}"
            )

    @staticmethod
    def _writers(trainer: Trainer) -> str:
        """Returns a sentence on who may have written weights behind the enforcer."""
        others = Lineup(trainer).others()
        named = f"one of the callbacks {', '.join(others)}, or " if others else ""
        return f"Written after an optimizer step by {named}a hook of the module"

    def hold(self, masks: MaskSet, trainer: Trainer) -> None:
        """Sets the masks in force in a running fit: zeroes pruned weights, their moments and their averages."""
        self.masks = masks
        self.weights = access_to(trainer, masks)
        self.weights.project()
        self._project_averages(trainer)

    def _project_averages(self, trainer: Trainer) -> None:
        """Zeroes pruned weights in the averages that callbacks keep; what is averaged after that is zero there."""
        assert self.masks is not None
        for average in Lineup(trainer).averages():
            with suppress(ValueError):  # an average of another part of the module
                self.masks.apply_(average.named_parameters())

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._project_averages(trainer)
        if sharded(trainer.strategy):
            assert self.weights is not None
            wrong = self.weights.violations()
            if wrong:
                raise ValueError(
                    f"MaskEnforcer: {sum(wrong.values())} pruned weights are not zero when training ends, in "
                    f"{len(wrong)} layers, first {next(iter(wrong))}. {self._writers(trainer)}"
                )

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
        model = find_language_model(pl_module)
        stages = find_stages(model, self.blocks)
        layers, _ = stage_targets(model, stages)
        zeros = masks_from_zeros(trainer, prunable_weights(model, stages), model)
        # What stays dense by default, such as routers, the last layer or other stacks, may have been pruned elsewhere.
        known, sparsity = parameters_of(layers.values()), zeros.layer_sparsity()
        held = [name for name in zeros if name in known or sparsity[name] >= SPARSE]
        masks = MaskSet.join(MaskSet({name: zeros[name]}) for name in held)
        if masks.sparsity() == 0:
            raise ValueError(
                "MaskEnforcer found no masks: there is no OneShotPrune among the callbacks, masks= was not given, and "
                f"none of the {len(layers)} layers that are pruned by default holds a zero"
            )
        report = rank_zero_info if masks.sparsity() >= SPARSE else rank_zero_warn
        report(f"MaskEnforcer holds the zeros of the model: {masks.sparsity():.2%} of {len(masks)} layers")
        return masks
