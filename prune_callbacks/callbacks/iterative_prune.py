"""IterativePrune: raises the sparsity during a fit, by a schedule, with or without rewinding."""

import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.anatomy.experts import dense_in_mixtures, describe_dense
from prune_callbacks.anatomy.stages import Stages, find_stages, stage_targets
from prune_callbacks.anatomy.target import Target
from prune_callbacks.anatomy.targets import SPARSE, parameters_of, refuse_parts
from prune_callbacks.anatomy.torch_modules import other_matrices
from prune_callbacks.callbacks.built_later import shapes_in_setup
from prune_callbacks.callbacks.iterative_settings import check_length, check_restored, settings_of
from prune_callbacks.callbacks.kinds import PrunesInRounds
from prune_callbacks.callbacks.lightning_internals import random_state, restore_random_state
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.mask_enforcer import MaskEnforcer
from prune_callbacks.callbacks.rewind import Rewind, RewindFile
from prune_callbacks.callbacks.zeros import masks_from_zeros
from prune_callbacks.engine.fitting import check_all_prunable, without_misfits
from prune_callbacks.engine.iterative import Scope, check_shrinkable, shrink_masks
from prune_callbacks.parallel.strategies import world
from prune_callbacks.pruners import Magnitude, Pruner
from prune_callbacks.sparsity import MaskSet, Schedule, Unstructured
from prune_callbacks.sparsity.schedules import Unit, check_schedule


class IterativePrune(PrunesInRounds):
    """
    Prunes during training: removes the survivors of lowest score whenever the schedule rises.

    Put it before `MaskEnforcer()` among the callbacks, which holds the masks between the changes and zeroes the
    optimizer's moments of newly pruned weights. A removed weight never returns. The first masks are the masks of a
    `OneShotPrune` before it, else the masks given to `MaskEnforcer`, else the zeros of a sparse model.

    Masks change after a batch or an epoch, before checkpoints are written there. The checkpoint contains round,
    sparsity, masks, the path of the rewind file and torch's random state.

    A schedule in steps counts optimizer steps as `trainer.global_step` does: in manual optimization it adds up those of
    all optimizers. How many such steps a training makes is not known before it; if they do not suffice, a warning at
    the end says so. A schedule in epochs needs no such count.

    Args:
        schedule: the sparsity as a function of time, e.g. `IMPSchedule(0.9, rounds=10, every=500)`.
        scope: "global": one pool of all layers. "layer": every layer has the schedule's sparsity.
        pruner: `Magnitude`, or another whose scores need no calibration. The sparsity of its pattern must be the
            schedule's target. None: `Magnitude(Unstructured(schedule.target))`.
        rewind: every round starts again from an early state of the training; None: training continues.
        targets: patterns of layer names, e.g. `["*.mlp.*"]`; None for those that `prune_sequentially` takes.
        blocks: the name of the list of blocks, or of several, where they cannot be found.

    Attributes:
        masks: the `MaskSet` in force.
        round: how many times the schedule has risen.
        target: the schedule's current sparsity.
        seconds: wall time of all changes so far.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        scope: Scope = "global",
        pruner: Pruner | None = None,
        rewind: Rewind | None = None,
        targets: Sequence[str] | str | None = None,
        blocks: str | Sequence[str] | None = None,
    ) -> None:
        check_schedule("IterativePrune", schedule)
        if rewind is not None and not isinstance(rewind, Rewind):
            raise ValueError(f"IterativePrune: rewind is None or Rewind(step=...), got {rewind!r}")
        sparsities = [schedule(time) for time in schedule.changes]
        if sparsities != sorted(set(sparsities)) or not sparsities:
            raise ValueError(f"IterativePrune: the sparsity must rise at every change, {schedule!r} has {sparsities}")
        self.pruner = Magnitude(Unstructured(schedule.target)) if pruner is None else pruner
        check_shrinkable(self.pruner, scope, schedule.target)
        self.schedule = schedule
        self.scope = scope
        self.rewind = rewind
        self.targets = targets
        self.blocks = blocks
        self._begin()

    def _begin(self) -> None:
        self.masks: MaskSet | None = None
        self.round = 0
        self.target = 0.0
        self.seconds = 0.0
        self._file = None if self.rewind is None else RewindFile(self.rewind)
        self._restored: dict[str, Any] | None = None
        self._random_states: list[dict[str, Any]] = []
        self._layers: dict[str, Target] = {}
        self._left: dict[str, str] = {}
        self._targets: dict[str, list[Target]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not Lineup(trainer).begins_fit(self, stage):
            return
        self._begin()
        model = shapes_in_setup("IterativePrune", pl_module, self.blocks)
        stages = find_stages(model, self.blocks)
        layers = self._layers = self._found(model, stages)
        if self.targets is None:
            others = {n: why for n, why in other_matrices(stages.parts, layers).items() if n not in self._left}
            for text in describe_dense(*dense_in_mixtures(stages.parts, layers), others):
                rank_zero_warn(f"IterativePrune: {text}")
        check_all_prunable(layers.values(), self.pruner.pattern)
        self.masks = MaskSet.all_kept({name: p.shape for name, p in parameters_of(layers.values()).items()})
        self._targets = {name: [t for t in layers.values() if t.parameter_name == name] for name in self.masks}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:
            check_length(trainer, self.schedule, self.rewind)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            check_restored(trainer, self._restored, self._settings())
            if self._file is not None:
                self._file.check(trainer)
            return
        assert self.masks is not None
        self.masks = self.masks & self._masks_so_far(trainer)
        if self._file is not None:
            self._file.write_at_its_step(trainer)
        self._change(trainer, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if len(self._random_states) == trainer.world_size:
            restore_random_state(self._random_states[trainer.global_rank], trainer.strategy.root_device)
        self._random_states = []
        # Lightning does not repeat on_train_epoch_end where a checkpoint was written by the epoch's last step.
        if self._epochs:
            self._change(trainer, trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._file is not None:
            self._file.write_at_its_step(trainer)
        if not self._epochs:
            self._change(trainer, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epochs:
            self._change(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.target < self.schedule.target and not trainer.fast_dev_run:
            rank_zero_warn(
                f"IterativePrune: training ended after {trainer.global_step} optimizer steps, at a sparsity of "
                f"{self.target}, and the schedule ends at {self.schedule.target}, after {self.schedule.changes[-1]} "
                f"{self.schedule.unit}s"
            )

    @property
    def _epochs(self) -> bool:
        return self.schedule.unit == "epoch"

    def rises(self, unit: Unit, time: int) -> bool:
        """Returns whether the masks change once `time` steps or epochs are finished."""
        return unit == self.schedule.unit and self.schedule(time) > self.target

    def _change(self, trainer: Trainer, now: int) -> None:
        if not self.rises(self.schedule.unit, now):
            return
        begin = time.perf_counter()
        target = self.schedule(now)
        assert self.masks is not None
        weights = Lineup(trainer).weights(self.masks)
        masks = shrink_masks(weights, self._targets, target, self.pruner, self.scope)
        if self._file is not None:
            self._file.go_back(trainer)
        self._enforcer(trainer).hold(masks, trainer)
        # Set last, so that an interrupted change does not count as made.
        self.round, self.target, self.masks = bisect_right(self.schedule.changes, now), target, masks
        self.seconds += time.perf_counter() - begin
        empty = [name for name, share in masks.layer_sparsity().items() if share == 1]
        if empty:
            rank_zero_warn(
                f"IterativePrune: {len(empty)} layers have no weight left, first {empty[0]}: the weights of all layers "
                'are compared with each other; scope="layer" removes the same share of each'
            )
        rank_zero_info(
            f"round {self.round} of {len(self.schedule.changes)}: {masks.sparsity():.2%} zeros after {now} "
            f"{self.schedule.unit}s" + (f", back to step {self.rewind.step}" if self.rewind is not None else "")
        )

    def _masks_so_far(self, trainer: Trainer) -> MaskSet:
        """Returns the masks of OneShotPrune, the masks given to MaskEnforcer, or the zeros of a sparse model."""
        pruned = Lineup(trainer).one_shot_report()
        if pruned is not None:
            return pruned.masks
        given = self._enforcer(trainer).given
        if isinstance(given, MaskSet):
            return given
        module = trainer.lightning_module
        zeros = masks_from_zeros(trainer, parameters_of(self._layers.values()), find_language_model(module))
        if zeros.sparsity() < SPARSE:
            return MaskSet({})
        rank_zero_info(f"IterativePrune begins with the zeros of the model: {zeros.sparsity():.2%}")
        return zeros

    def _settings(self) -> dict[str, Any]:
        return settings_of(self.schedule, self.pruner, self.scope, self.targets, self.rewind)

    def state_dict(self) -> dict[str, Any]:
        if self.masks is None:
            return {}
        return self._settings() | {
            "round": self.round,
            "target": self.target,
            "seconds": self.seconds,
            "masks": self.masks.state_dict(),
            "rewind_file": None if self._file is None else self._file.state_dict(),
            "random_states": [random_state()],
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # All processes share one checkpoint, and each has its own random state.
        state = checkpoint["callbacks"].get(self.state_key)
        if state:
            state["random_states"] = world(trainer).gather(random_state(trainer.strategy.root_device))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._restored = state_dict
        self.round, self.target, self.seconds = (state_dict[key] for key in ("round", "target", "seconds"))
        self.masks = MaskSet.from_state_dict(state_dict["masks"])
        self._random_states = state_dict["random_states"]
        if self._file is not None and state_dict["rewind_file"] is not None:
            self._file.load_state_dict(state_dict["rewind_file"])

    def _found(self, model: nn.Module, stages: Stages) -> dict[str, Target]:
        layers, self._left = stage_targets(model, stages, self.targets)
        if self.targets is None and not stages.found_in_blocks:
            layers, _ = without_misfits(layers, self.pruner.pattern)
        refuse_parts("IterativePrune", layers.values())
        return layers

    def _enforcer(self, trainer: Trainer) -> MaskEnforcer:
        enforcer = Lineup(trainer).first(MaskEnforcer)
        assert enforcer is not None
        return enforcer
