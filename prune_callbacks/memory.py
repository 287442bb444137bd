"""Memory of a model, a device and the process, in bytes."""

import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn


def model_bytes(model: nn.Module) -> int:
    """Returns the bytes that the parameters occupy; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def free_memory(device: torch.device) -> float:
    """Returns the free bytes on a CUDA device; infinity for other devices, whose free memory is not measured."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float("inf")


def peak_memory(device: torch.device) -> int:
    """
    Returns the peak in bytes: of allocated device memory on CUDA, else of the process's resident set.

    Returns 0 where the system does not report the resident set (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Resets `peak_memory` to the memory in use now; the peak of the resident set is reset on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
