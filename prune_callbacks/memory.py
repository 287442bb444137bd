"""How much memory there is, and how much was used."""

import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn


def model_bytes(model: nn.Module) -> int:
    """What the parameters take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def free_memory(device: torch.device) -> float:
    """Bytes that are left on a CUDA device; of the CPU's memory nothing is known: infinity."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float("inf")


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of allocated device memory on CUDA, else the process's resident set; 0 where no system call tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` begin again at what is in use; of a process's resident set only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
