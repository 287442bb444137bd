"""What the engine reports: one entry a layer, the masks, time and memory."""

import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.sparsity import MaskSet


@dataclass(frozen=True)
class LayerReport:
    """
    One pruned layer.

    Attributes:
        name: the parameter's name, as in the model's `state_dict`; of one that holds experts, with the expert's number.
        shape: (out, in).
        sparsity: fraction removed.
        loss: squared error of the layer's output over the calibration tokens; None without a Gram.
        relative_loss: `loss` over the squared norm of the dense layer's output, on the same inputs.
        seconds: what the solver took.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    loss: float | None
    relative_loss: float | None
    seconds: float


@dataclass(frozen=True)
class PruneReport:
    """
    What `prune_sequentially` did.

    Attributes:
        masks: the keep masks, by parameter name; of one that holds experts, (experts, ...).
        layers: one entry per pruned layer, in order.
        skipped: layers that were asked for and left dense, with the reason.
        seconds: wall time of the whole run.
        peak_memory_bytes: the process's peak (on a CUDA device: peak of allocated device memory).
        input_first: names of masks stored as (in, out), those of `Conv1D` layers.
        by_magnitude: experts that too few calibration tokens reached, and how many did: pruned by Magnitude.
        scales: of layers that were also rounded, by parameter name: (out, groups), float16; see `Grid`.
    """

    masks: MaskSet
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    input_first: frozenset[str] = frozenset()
    scales: dict[str, Tensor] = field(default_factory=dict)
    by_magnitude: dict[str, int] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of the targeted weights removed."""
        return self.masks.sparsity()

    def state_dict(self) -> dict[str, Any]:
        """Plain values that `torch.load(weights_only=True)` accepts; the masks at one bit per weight."""
        return {
            "masks": self.masks.state_dict(),
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
            "skipped": dict(self.skipped),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "input_first": sorted(self.input_first),
            "scales": dict(self.scales),
            "by_magnitude": dict(self.by_magnitude),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "PruneReport":
        """The inverse of `state_dict`."""
        return cls(
            masks=MaskSet.from_state_dict(state["masks"]),
            layers=tuple(LayerReport(**layer | {"shape": tuple(layer["shape"])}) for layer in state["layers"]),
            skipped=state["skipped"],
            seconds=state["seconds"],
            peak_memory_bytes=state["peak_memory_bytes"],
            input_first=frozenset(state["input_first"]),
            scales=state.get("scales", {}),  # absent from checkpoints of 0.1
            by_magnitude=state.get("by_magnitude", {}),
        )


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
