"""The outcome of a run's pruning: zeros counted in the weights, settings, versions and device."""

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from prune_callbacks.callbacks.iterative_prune import IterativePrune
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.callbacks.permute_channels import PermuteChannels
from prune_callbacks.memory import peak_memory
from prune_callbacks.reconstruction.report import reconstruction_record
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.run_record import RunRecord, Zeros

PACKAGES = ("prune-callbacks", "torch", "lightning", "transformers")


def masks_in_force(one_shot: OneShotPrune | None, iterative: IterativePrune | None) -> MaskSet:
    """Returns the masks of the callback that pruned last."""
    masks = iterative.masks if iterative is not None else None
    if masks is None:
        assert one_shot is not None
        assert one_shot.report is not None
        masks = one_shot.report.masks
    return masks


def outcome(
    trainer: Trainer,
    one_shot: OneShotPrune | None,
    iterative: IterativePrune | None,
    dirpath: Path,
    further: Sequence[str] = (),
) -> dict[str, Any]:
    """
    Returns all fields of `RunRecord` that need no evaluation of the model; a collective of all processes.

    Args:
        trainer: the trainer of the fit.
        one_shot: the callback that pruned once; None: there is none.
        iterative: the callback that prunes in rounds; None: there is none.
        dirpath: the run's folder.
        further: packages to report the versions of, besides `PACKAGES`.
    """
    masks = masks_in_force(one_shot, iterative)
    # Counted in the weights, not in the masks: without an enforcer, training overwrites zeros.
    weights = Lineup(trainer).weights(masks)
    zeros, violations = weights.layer_sparsity(), weights.violations()
    report = one_shot.report if one_shot is not None else None
    peaks = [peak_memory(trainer.strategy.root_device)] + ([report.peak_memory_bytes] if report else [])
    return {
        **_pruning(one_shot, iterative),
        "optimizer_steps": trainer.global_step,
        "strategy": type(trainer.strategy).__name__,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "adapter": "adapter" if (dirpath / "adapter").is_dir() else None,
        "sparsity": Zeros(_target(one_shot, iterative), _achieved(masks, zeros), zeros),
        "violations": violations,
        "reconstruction_loss": {layer.name: layer.relative_loss for layer in report.layers} if report else {},
        "reconstruction": _reconstruction(one_shot),
        "skipped": report.skipped if report else {},
        "by_magnitude": report.by_magnitude if report else {},
        "peak_memory_bytes": max(peaks),
        "versions": {name: version(name) for name in (*PACKAGES, *further)} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def _reconstruction(one_shot: OneShotPrune | None) -> dict[str, Any]:
    """Returns the record of the blocks' reconstruction; {} without one."""
    if one_shot is None or one_shot.report is None or one_shot.reconstruction is None:
        return {}
    report = one_shot.report
    return reconstruction_record(one_shot.reconstruction, report.reconstruction, report.untrained)


def note_costs(
    trainer: Trainer, run: RunRecord, one_shot: OneShotPrune | None, iterative: IterativePrune | None
) -> None:
    """Writes into a record what pruning has cost so far: the wall time of all changes of the masks, and the tokens."""
    report = one_shot.report if one_shot is not None else None
    run.seconds.prune = (report.seconds if report else 0.0) + (iterative.seconds if iterative is not None else 0.0)
    if report and report.tokens:
        run.tokens["prune"] = report.tokens
    if report and report.allocation_seconds:
        run.allocating = {"seconds": report.allocation_seconds}
    if one_shot is not None and report and report.writing_seconds:
        run.writing = {"windows": one_shot.written_windows, "seconds": report.writing_seconds}
    permute = Lineup(trainer).first(PermuteChannels)
    if permute is not None and permute.permuted:
        run.permuting = {"seconds": permute.seconds}


def _pruning(one_shot: OneShotPrune | None, iterative: IterativePrune | None) -> dict[str, Any]:
    """Returns the texts of pruners, allocation and schedule."""
    steps: list[object] = [] if one_shot is None else [one_shot.pruner, one_shot.reconstruction]
    steps += [] if iterative is None else [iterative.pruner]
    return {
        "pruner": ", then ".join(repr(step) for step in steps if step is not None),
        "allocation": repr(one_shot.allocation) if one_shot is not None and one_shot.allocation else None,
        "schedule": repr(iterative.schedule) if iterative is not None else None,
    }


def _target(one_shot: OneShotPrune | None, iterative: IterativePrune | None) -> float:
    """Returns the sparsity that the last pruning was asked for."""
    if iterative is not None:
        return iterative.schedule.target
    assert one_shot is not None
    return one_shot.pruner.pattern.sparsity


def _achieved(masks: MaskSet, zeros: Mapping[str, float]) -> float:
    """Returns the fraction of zeros in all pruned layers together."""
    sizes = {name: math.prod(masks.shape(name)) for name in masks}
    return sum(zeros[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))
