"""Writing weights, optimizer and scheduler state to a file during a fit, and putting them back."""

import hashlib
import os
from pathlib import Path

import torch
from lightning.pytorch import Trainer


def save_snapshot(trainer: Trainer, path: Path) -> str:
    """
    Writes the module's weights, the optimizers' and the learning-rate schedulers' state; returns the file's SHA-256.

    Rank 0 writes; whoever reads never sees half a file.
    """
    strategy = trainer.strategy
    state = {
        "state_dict": strategy.lightning_module_state_dict(),
        "optimizer_states": [strategy.optimizer_state(optimizer) for optimizer in strategy.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)
    strategy.barrier("prune_callbacks.snapshot")
    return snapshot_digest(path)


def snapshot_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_snapshot(trainer: Trainer, path: Path, *, optimizer: bool) -> None:
    """
    Puts the weights of a file that `save_snapshot` wrote back into the module.

    Args:
        trainer: in the middle of the fit that wrote the file, or of one resumed from it.
        path: the file.
        optimizer: the optimizers' and schedulers' state too.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    trainer.strategy.load_model_state_dict(state, strict=True)
    if optimizer:
        trainer.strategy.load_optimizer_state_dict(state)
        for config, scheduler in zip(trainer.lr_scheduler_configs, state["lr_schedulers"], strict=True):
            config.scheduler.load_state_dict(scheduler)
