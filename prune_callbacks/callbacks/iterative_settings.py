"""Checks the settings of an iterative pruning: against those in a checkpoint, and against the length of training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.rewind import Rewind
from prune_callbacks.engine.iterative import Scope
from prune_callbacks.pruners import Pruner
from prune_callbacks.sparsity import Schedule


def settings_of(
    schedule: Schedule, pruner: Pruner, scope: Scope, targets: Sequence[str] | str | None, rewind: Rewind | None
) -> dict[str, Any]:
    """Returns the settings as plain values, for the checkpoint."""
    return {
        "schedule": repr(schedule),
        "pruner": repr(pruner),
        "scope": scope,
        "targets": targets if isinstance(targets, str) or targets is None else list(targets),
        "rewind": None if rewind is None else f"Rewind({rewind.step}, {rewind.optimizer})",
    }


def check_restored(trainer: Trainer, restored: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """
    Raises ValueError unless the fit can resume from `trainer.ckpt_path`; warns of other changed settings.

    Args:
        trainer: the trainer of the resumed fit.
        restored: the state of `IterativePrune` in the checkpoint; None if the checkpoint has none.
        settings: the settings of this fit, from `settings_of`.

    Raises:
        ValueError: the checkpoint has no state of `IterativePrune`, or was written with other `targets` or `rewind`.
    """
    if restored is None:
        raise ValueError(
            f"the checkpoint {trainer.ckpt_path} holds no state of IterativePrune. To prune its model, load it and "
            "start a new fit without ckpt_path"
        )
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.processed > epochs.completed:  # Lightning makes them equal if max_epochs limits the fit
        rank_zero_warn(
            f"the checkpoint {trainer.ckpt_path} was written at the end of an epoch of a fit limited by max_steps "
            "alone, where Lightning 2.6 repeats a batch: the resumed training will not be the same to the bit. "
            "ModelCheckpoint(every_n_train_steps=) writes checkpoints that can be resumed exactly"
        )
    for name in ("targets", "rewind"):
        if restored[name] != settings[name]:
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} was written with {name}={restored[name]}, and "
                f"IterativePrune has {name}={settings[name]}; resume with the same"
            )
    for name in ("schedule", "pruner", "scope"):
        if restored[name] != settings[name]:
            rank_zero_warn(f"the checkpoint was trained by {restored[name]}; the fit resumes with {settings[name]}")


def check_length(trainer: Trainer, schedule: Schedule, rewind: Rewind | None) -> None:
    """
    Raises ValueError if the schedule is known to end, or rewinding to begin, too late for the training.

    Only bounds that hold are checked: `max_epochs`, `max_steps`, and in automatic optimization the number of batches.
    In manual optimization nobody knows how often the module will step its optimizers.

    Args:
        trainer: the trainer of a fit that begins.
        schedule: the sparsity over time.
        rewind: the step at which rounds start again; None: no rewinding.
    """
    first: float = schedule.changes[0]
    last: float = schedule.changes[-1]
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    if schedule.unit == "epoch":
        if last >= epochs:
            raise ValueError(_too_late(schedule, last, "epochs", epochs))
        first, last = steps_of(trainer, first), steps_of(trainer, last)
    steps = min(math.inf if trainer.max_steps == -1 else trainer.max_steps, steps_of(trainer, epochs))
    if not math.isinf(last) and last >= steps:
        raise ValueError(_too_late(schedule, last, "optimizer steps", steps))
    if rewind is not None and rewind.step >= first:
        raise ValueError(
            f"IterativePrune: Rewind(step={rewind.step}) lies beyond the first round, which ends after "
            f"{first:g} of {steps:g} optimizer steps; rewind to an earlier step"
        )


def _too_late(schedule: Schedule, last: float, unit: str, end: float) -> str:
    return (
        f"IterativePrune: the schedule reaches {schedule.target} after {last:g} {unit}, and training ends after "
        f"{end:g}. Train for longer (max_steps, max_epochs), or end the schedule earlier. Steps are counted as in "
        "trainer.global_step, which adds up the steps of all optimizers"
    )


def steps_of(trainer: Trainer, epochs: float) -> float:
    """Returns the number of optimizer steps in the first epochs of a fit; infinity where it is not known before."""
    if math.isinf(epochs) or not trainer.lightning_module.automatic_optimization:
        return math.inf
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if math.isinf(batches):  # a dataset without a length
        return math.inf
    changing = Lineup(trainer).first(GradientAccumulationScheduler)
    every = changing.get_accumulate_grad_batches if changing else lambda epoch: trainer.accumulate_grad_batches
    return sum(math.ceil(batches / every(epoch)) for epoch in range(int(epochs)))
