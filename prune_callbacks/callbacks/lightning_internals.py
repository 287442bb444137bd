"""Reads states of a Trainer and of torch for which Lightning has no public interface."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden


def resumed_checkpoint(trainer: Trainer) -> Any:
    """
    Returns the checkpoint that the running fit will load after `setup`; None if there is none, or no fit.

    Lightning 2.6 passes `ckpt_path` from `Trainer.fit` to `Trainer._run` as an argument. It sets `trainer.ckpt_path`
    only after `setup`; until then the attribute holds the value of the previous fit. So the argument is read from the
    frame of `_run`.

    Raises:
        RuntimeError: this version of Lightning has no such argument. Without the error, a resumed fit would count as
            a new one, and its model would be pruned a second time.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer and "ckpt_path" in frame.f_locals:
            return frame.f_locals["ckpt_path"]
    if trainer.state.status == TrainerStatus.RUNNING:
        raise RuntimeError(
            f"this version of Lightning ({lightning.__version__}) does not say whether the fit resumes from a "
            "checkpoint; use one that prune-callbacks allows (lightning>=2.6.6,<2.7)"
        )
    return None


def training_data_source(trainer: Trainer) -> Any:
    """Returns the module or data module that makes the training data; None if `fit` was given a loader."""
    source = trainer.fit_loop._data_source
    return source.instance if source.is_module() else None


@contextmanager
def before_setup_of(source: Any, makes: str, otherwise: str) -> Iterator[None]:
    """
    Adds to an error of a module's data or steps that the module's own `setup` has not run yet, where it has one.

    Args:
        source: the module that makes the data, or whose step it is; a data module, whose `setup` has run, and None
            add nothing.
        makes: the name of the method that fails.
        otherwise: what else the user can do, the end of the sentence.
    """
    try:
        yield
    except (AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        if not isinstance(source, LightningModule) or not is_overridden("setup", source, LightningModule):
            raise
        raise ValueError(
            f"{makes} of {type(source).__name__} failed ({type(error).__name__}: {error}). Its own setup() "
            "has not run yet: Lightning calls that of the callbacks first. Make what it needs in __init__ or "
            f"prepare_data, or in a LightningDataModule, whose setup comes earlier, or {otherwise}"
        ) from error


def makes_in_setup(module: Any) -> bool:
    """
    Returns whether a module makes more in hooks that Lightning calls after the callbacks' `setup`.

    A data module does not: its `setup` comes before.
    """
    if not isinstance(module, LightningModule):
        return False
    return any(is_overridden(hook, module, LightningModule) for hook in ("setup", "configure_model"))


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Returns the state of torch's generators on the CPU and on this process's CUDA device, for a checkpoint."""
    cuda = None if device is None or device.type != "cuda" else torch.cuda.get_rng_state(device)
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores the result of `random_state`; the CUDA state only if it was saved and `device` is a CUDA device."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def logs_now(trainer: Trainer) -> bool:
    """Returns whether loggers get values at this training batch, by `log_every_n_steps`; never if that is 0."""
    every: int = trainer.log_every_n_steps
    return every > 0 and int(trainer.global_step) % every == 0
