"""What callbacks ask of a Trainer, where Lightning has no direct answer."""

import sys
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerStatus


def resumed_checkpoint(trainer: Trainer) -> Any:
    """
    The checkpoint that the running fit will load after `setup`, or None.

    Lightning (2.6) hands `ckpt_path` from `Trainer.fit` to `Trainer._run` as an argument and makes it
    available as `trainer.ckpt_path` only once `setup` is over; until then that holds the value of the fit before. So
    the argument is read from the frame of `_run`. None outside of a fit.

    Raises:
        RuntimeError: Lightning has changed so that the argument cannot be found. A resumed fit would be taken for a new
            one, and its model pruned a second time.
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


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The state of torch's generators, on the CPU and on this process's device, for a checkpoint."""
    cuda = None if device is None or device.type != "cuda" else torch.cuda.get_rng_state(device)
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_state`; without a device that has a generator, that one's is left out."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def logs_now(trainer: Trainer) -> bool:
    """Whether this training batch is one that loggers hear of, by `log_every_n_steps`; 0 is never."""
    every: int = trainer.log_every_n_steps
    return every > 0 and int(trainer.global_step) % every == 0
