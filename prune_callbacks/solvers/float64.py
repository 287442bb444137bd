"""Float64, on every device: the CPU lends it to those that have none, such as Apple's GPU (MPS)."""

import torch
from torch import Tensor

KNOW_FLOAT64 = ("cpu", "cuda")
"""Types of devices with float64. Others have none (MPS), or not in every model."""


def float64_device(device: torch.device) -> torch.device:
    """Returns where numbers of a device are kept in float64: there, or on the CPU if the device has no float64."""
    return device if device.type in KNOW_FLOAT64 else torch.device("cpu")


def in_float64(x: Tensor) -> Tensor:
    """Returns a tensor in float64, on `float64_device`."""
    # Moved before it is converted: a conversion on the way would be made on the old device.
    return x.to(float64_device(x.device)).double()


def sum_in_float64(x: Tensor) -> Tensor:
    """Sums all entries in float64; returns a scalar on `float64_device`."""
    if float64_device(x.device) == x.device:
        return x.sum(dtype=torch.float64)
    # Sums, not whole matrices, are copied to the CPU. Those of single rows are as precise as the device's other ones.
    return in_float64(x.flatten(1).sum(1) if x.ndim > 1 else x).sum()
