"""Writing weights, optimizer and scheduler state to a file during a fit, and putting them back."""

import hashlib
import os
import pickle
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
        try:
            torch.load(partial, mmap=True, weights_only=True)  # not only at the first rewinding, rounds later
        except pickle.UnpicklingError as error:
            raise ValueError(
                "the state of an optimizer or learning-rate scheduler holds objects that cannot be read back safely: "
                f"{error}"
            ) from error
        os.replace(partial, path)
    strategy.barrier("prune_callbacks.snapshot")
    return _digest(path)


def check_snapshot(path: Path, digest: str) -> None:
    """Raises ValueError if there is no file at `path`, or another than the one that was written."""
    if not path.is_file():
        raise ValueError(f"there is no rewind file at {path}. Put it back, or name its folder with Rewind(dirpath=)")
    if _digest(path) != digest:
        raise ValueError(
            f"{path} is not the rewind file that this training wrote: another run has written over it. Give every run "
            "a folder of its own with Rewind(dirpath=)"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_snapshot(trainer: Trainer, path: Path, digest: str, *, optimizer: bool) -> None:
    """
    Puts the weights of a file that `save_snapshot` wrote back into the module.

    Args:
        trainer: in the middle of the fit that wrote the file, or of one resumed from it.
        path: the file.
        digest: what `save_snapshot` returned.
        optimizer: the optimizers' and schedulers' state too.

    Raises:
        ValueError: the file is missing, or not the one that was written.
    """
    check_snapshot(path, digest)
    state = torch.load(path, map_location="cpu", weights_only=True)
    trainer.strategy.load_model_state_dict(state, strict=True)
    if optimizer:
        trainer.strategy.load_optimizer_state_dict(state)
        for config, scheduler in zip(trainer.lr_scheduler_configs, state["lr_schedulers"], strict=True):
            config.scheduler.load_state_dict(scheduler)
