"""Runs a LightningModule on its own batches, for calibration."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from prune_callbacks.calibration.batches import device_of

Forward = Callable[[Any, Any], object]
"""Runs a module on a batch: a function of both."""


def own_step(pl_module: LightningModule, forward: Forward | None) -> Callable[[nn.Module, Any], object]:
    """
    Returns the function that runs a module on a batch of its training data.

    It is `forward`; else the module's `training_step`, or under manual optimization, which steps optimizers,
    `validation_step`. Batches go through the module's hooks of their transfer to the device.

    Args:
        pl_module: the module.
        forward: a function of module and batch; None: the module's own step.

    Raises:
        ValueError: the module has no such step; or, when it runs, that the step failed.
    """
    step = forward or _step(pl_module)

    # In `setup` the strategy has no model yet whose hooks of the transfer it would call.
    def run(model: nn.Module, batch: Any) -> object:
        batch = pl_module._on_before_batch_transfer(batch)
        batch = pl_module._apply_batch_transfer_handler(batch, device=device_of(pl_module))
        try:
            return step(pl_module, batch)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(pl_module).__name__} failed on a calibration batch ({type(error).__name__}: {error}). "
                "Calibration runs its own step when the fit begins: before its setup and on_train_start, without "
                "optimizers and gradients. Say how the module runs on a batch: "
                "OneShotPrune(..., forward=lambda module, batch: module(batch[0]))"
            ) from error

    return run


def _step(pl_module: LightningModule) -> Forward:
    names = ["training_step", "validation_step"] if pl_module.automatic_optimization else ["validation_step"]
    name = next((name for name in names if is_overridden(name, pl_module, LightningModule)), None)
    if name is None:
        manual = "" if pl_module.automatic_optimization else ", since its training_step steps optimizers by hand"
        raise ValueError(
            f"calibration runs {' or '.join(names)} of {type(pl_module).__name__}{manual}, and it has none. Define it, "
            "or say how the module runs on a batch: OneShotPrune(..., forward=lambda module, batch: module(batch[0]))"
        )
    step = getattr(pl_module, name)
    numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return lambda module, batch: step(batch, 0) if numbered else step(batch)
