"""IterativePrune: raises the sparsity during a fit, by a schedule, with or without rewinding."""

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from prune_callbacks.calibration import (
    PruneReport,
    Scope,
    check_shrinkable,
    find_blocks,
    find_language_model,
    find_targets,
    shrink_masks,
)
from prune_callbacks.callbacks.mask_enforcer import MaskEnforcer
from prune_callbacks.parallel import load_snapshot, refuse_unserved, save_snapshot, snapshot_digest
from prune_callbacks.pruners import Magnitude
from prune_callbacks.sparsity import MaskSet, Schedule, Unstructured
from prune_callbacks.sparsity.schedules import Unit


@dataclass(frozen=True)
class Rewind:
    """
    Where every round of `IterativePrune` starts again (Frankle & Carbin 2019; Renda et al. 2020).

    Args:
        step: the finished optimizer steps after which weights and training state are written to a file; 0, the
            initial weights, is the lottery ticket's.
        optimizer: restore the optimizers' and the learning-rate schedulers' state as well; else they go on.
        dirpath: folder of the file; None: the logger's folder, else the trainer's `default_root_dir`.
    """

    step: int
    optimizer: bool = True
    dirpath: str | Path | None = None

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"Rewind: step is a number of finished optimizer steps, at least 0, got {self.step}")


class IterativePrune(Callback):
    """
    Prunes during training: whenever the schedule rises, the smallest survivors go.

    Stands before `MaskEnforcer()` among the callbacks, which holds the masks between the changes and zeroes the
    optimizer's moments at newly pruned places. A removed weight never returns. With a `OneShotPrune` before it the
    masks begin with those of that one.

    Changes happen after an optimizer step or an epoch, before checkpoints are written there. Round, sparsity, masks
    and the place of the rewind file are part of the checkpoint.

    Args:
        schedule: the sparsity as a function of time, e.g. `IMPSchedule(0.9, rounds=10, every=500)`.
        scope: "global": one pool of all layers. "layer": every layer has the schedule's sparsity.
        pruner: `Magnitude` with the pattern to reach; its sparsity must be the schedule's target. None:
            `Magnitude(Unstructured(schedule.target))`.
        rewind: start every round again from an early state of the training; None: train on.
        targets: patterns of layer names, e.g. `["*.mlp.*"]`; None for all linear layers of the decoder blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.

    Attributes:
        masks: the `MaskSet` in force.
        round: how many times the schedule has risen.
        target: the schedule's sparsity now.
        seconds: what the changes took so far.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        scope: Scope = "global",
        pruner: Magnitude | None = None,
        rewind: Rewind | None = None,
        targets: Sequence[str] | str | None = None,
        blocks: str | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ValueError(f"IterativePrune takes a schedule such as CubicSchedule(0.8, 0, 1000), got {schedule!r}")
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
        self._snapshot: Path | None = None
        self._digest = ""
        self._restored = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_unserved(trainer.strategy)
        self._begin()
        self._enforcer(trainer)
        layers = self._layers(pl_module)
        for name, layer in layers.items():
            weight = layer.get_parameter("weight")
            try:
                self.pruner.pattern.check_shape((weight.shape[0], weight.shape[1]))
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
        shapes = {f"{name}.weight": layer.get_parameter("weight").shape for name, layer in layers.items()}
        everything = (MaskSet({name: torch.ones(shape, dtype=torch.bool)}) for name, shape in shapes.items())
        self.masks = MaskSet.join(everything)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        first, last, unit = self.schedule.changes[0], self.schedule.changes[-1], self.schedule.unit
        steps = trainer.estimated_stepping_batches
        length = steps if unit == "step" else trainer.max_epochs or 0
        if 0 < length <= last:
            raise ValueError(
                f"IterativePrune: the schedule reaches {self.schedule.target} after {last} {unit}s, and training ends "
                f"after {length:g}. Train for longer (max_steps, max_epochs), or end the schedule earlier"
            )
        first_step = first if unit == "step" else first * steps / max(1, length)
        if self.rewind is not None and self.rewind.step >= first_step:
            raise ValueError(
                f"IterativePrune: Rewind(step={self.rewind.step}) lies beyond the first round, which ends after "
                f"{first_step:g} of {steps:g} optimizer steps; rewind to an earlier step"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored:
            self._check_snapshot(trainer)
            return
        if trainer.ckpt_path is not None:
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} holds no state of IterativePrune. To prune its model, load it and "
                "start a new fit without ckpt_path"
            )
        for report in [getattr(callback, "report", None) for callback in trainer.callbacks]:
            if isinstance(report, PruneReport):
                assert self.masks is not None
                self.masks = self.masks & report.masks
        self._save_at_its_step(trainer)
        self._change(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._save_at_its_step(trainer)
        if self.schedule.unit == "step":
            self._change(trainer, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.schedule.unit == "epoch":
            self._change(trainer, trainer.current_epoch + 1)

    def rises(self, unit: Unit, time: int) -> bool:
        """Whether the masks change once `time` steps or epochs are finished."""
        return unit == self.schedule.unit and self.schedule(time) > self.target

    def _change(self, trainer: Trainer, now: int) -> None:
        if not self.rises(self.schedule.unit, now):
            return
        begin = time.perf_counter()
        assert self.masks is not None
        self.round = bisect_right(self.schedule.changes, now)
        self.target = self.schedule(now)
        if trainer.is_global_zero:
            layers = self._layers(trainer.lightning_module)
            self.masks = shrink_masks(layers, self.masks, self.target, self.pruner, self.scope)
        self.masks = trainer.strategy.broadcast(self.masks)
        if self.rewind is not None:
            assert self._snapshot is not None
            load_snapshot(trainer, self._snapshot, optimizer=self.rewind.optimizer)
        self._enforcer(trainer).hold(self.masks, trainer)
        self.seconds += time.perf_counter() - begin
        rank_zero_info(
            f"round {self.round} of {len(self.schedule.changes)}: {self.masks.sparsity():.2%} zeros after {now} "
            f"{self.schedule.unit}s" + (f", back to step {self.rewind.step}" if self.rewind is not None else "")
        )

    def _save_at_its_step(self, trainer: Trainer) -> None:
        if self.rewind is None or self._snapshot is not None or trainer.global_step < self.rewind.step:
            return
        folder = Path(self.rewind.dirpath or trainer.log_dir or trainer.default_root_dir)
        path = folder.resolve() / f"rewind_step_{self.rewind.step}.pt"
        self._digest = save_snapshot(trainer, path)
        self._snapshot = path

    def _check_snapshot(self, trainer: Trainer) -> None:
        if self.rewind is None or (self._snapshot is None and trainer.global_step <= self.rewind.step):
            return
        if self._snapshot is None or not self._snapshot.is_file():
            raise ValueError(
                f"IterativePrune: the checkpoint {trainer.ckpt_path} needs its rewind file to go on, and there is none "
                f"at {self._snapshot}. Put it back, or name its folder with Rewind(dirpath=)"
            )
        if snapshot_digest(self._snapshot) != self._digest:
            raise ValueError(
                f"IterativePrune: {self._snapshot} is not the rewind file of the checkpoint {trainer.ckpt_path}: "
                "another run has written over it. Give every run a folder of its own with Rewind(dirpath=)"
            )

    def state_dict(self) -> dict[str, Any]:
        if self.masks is None:
            return {}
        return {
            "schedule": repr(self.schedule),
            "round": self.round,
            "target": self.target,
            "seconds": self.seconds,
            "masks": self.masks.state_dict(),
            "snapshot": None if self._snapshot is None else str(self._snapshot),
            "digest": self._digest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._restored = True
        self.round, self.target, self.seconds = (state_dict[key] for key in ("round", "target", "seconds"))
        self.masks = MaskSet.from_state_dict(state_dict["masks"])
        self._digest = state_dict["digest"]
        if state_dict["snapshot"] is not None:
            self._snapshot = Path(state_dict["snapshot"])
            if self.rewind is not None and self.rewind.dirpath is not None:
                self._snapshot = Path(self.rewind.dirpath).resolve() / self._snapshot.name
        if state_dict["schedule"] != repr(self.schedule):
            rank_zero_warn(f"the checkpoint was trained by {state_dict['schedule']}; it goes on by {self.schedule!r}")

    def _layers(self, pl_module: LightningModule) -> dict[str, torch.nn.Module]:
        return find_targets(find_blocks(find_language_model(pl_module), self.blocks), self.targets)

    def _enforcer(self, trainer: Trainer) -> MaskEnforcer:
        kinds = [type(callback) for callback in trainer.callbacks]
        enforcers = [c for c in trainer.callbacks[trainer.callbacks.index(self) :] if isinstance(c, MaskEnforcer)]
        if len(enforcers) != 1:
            raise ValueError(
                "IterativePrune decides which weights go, and needs MaskEnforcer() after it among the callbacks to "
                f"keep them at zero; found {[kind.__name__ for kind in kinds]}"
            )
        return enforcers[0]
