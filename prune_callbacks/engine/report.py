"""The reports of the engine: one entry per layer, masks, time and memory."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from prune_callbacks.pruners import Pruner
from prune_callbacks.reconstruction.report import BlockReport
from prune_callbacks.results import Result
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.sparsity.questions import removes_single_weights


@dataclass(frozen=True)
class LayerReport(Result):
    """
    The result of pruning one layer.

    Attributes:
        name: the parameter's name, as in the model's `state_dict`; for a fused expert, followed by its number.
        shape: (out, in).
        sparsity: the fraction of weights removed, in [0, 1).
        loss: squared error of the layer's output over the calibration tokens; None without a Gram.
        relative_loss: `loss` over the squared norm of the dense layer's output, on the same inputs.
        seconds: the wall time of solving for the layer.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    loss: float | None
    relative_loss: float | None
    seconds: float


@dataclass(frozen=True)
class PruneReport(Result):
    """
    The result of `prune_sequentially`.

    Attributes:
        masks: the keep masks, by parameter name; (experts, ...) for a parameter that holds experts.
        layers: one entry per pruned layer, in order.
        skipped: the reason for every layer that stayed dense, by name.
        seconds: wall time of the whole run.
        peak_memory_bytes: the process's peak memory; on a CUDA device, the peak of allocated device memory.
        input_first: names of masks stored as (in, out), as in `Conv1D` layers.
        by_magnitude: experts that were pruned by Magnitude because too few calibration tokens reached them, with the
            number of tokens; and matrices of recurrent layers, with 0.
        scales: the scales of layers that were also rounded, by parameter name: (out, groups), float16; see `Grid`.
        convolutions: the masks of convolutions, (out, in / groups, ...), by name, with the number of groups.
        reconstruction: one entry per reconstructed block, in order; () without reconstruction.
        tokens: how many calibration tokens there were on all ranks; 0 for batches of other kinds.
        untrained: the reason for every parameter of these blocks that reconstruction left as it was, by name.
        allocation_seconds: wall time of measuring the dense model for an allocation, a part of `seconds`.
        writing_seconds: wall time of writing further calibration windows before that, by `OneShotPrune`.
    """

    masks: MaskSet
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    input_first: frozenset[str] = frozenset()
    scales: dict[str, Tensor] = field(default_factory=dict)
    by_magnitude: dict[str, int] = field(default_factory=dict)
    convolutions: dict[str, int] = field(default_factory=dict)
    reconstruction: tuple[BlockReport, ...] = ()
    untrained: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    allocation_seconds: float = 0.0
    writing_seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Returns the fraction of the targets' weights that is removed."""
        return self.masks.sparsity()

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values that `torch.load(weights_only=True)` accepts, with the masks at one bit per weight."""
        return {
            "masks": self.masks.state_dict(),
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
            "skipped": dict(self.skipped),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "input_first": sorted(self.input_first),
            "scales": dict(self.scales),
            "by_magnitude": dict(self.by_magnitude),
            "convolutions": dict(self.convolutions),
            "reconstruction": [asdict(block) for block in self.reconstruction],
            "untrained": dict(self.untrained),
            "tokens": self.tokens,
            "allocation_seconds": self.allocation_seconds,
            "writing_seconds": self.writing_seconds,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "PruneReport":
        """Makes a report from the result of `state_dict`."""
        return cls(
            masks=MaskSet.from_state_dict(state["masks"]),
            layers=tuple(LayerReport(**layer | {"shape": tuple(layer["shape"])}) for layer in state["layers"]),
            skipped=state["skipped"],
            seconds=state["seconds"],
            peak_memory_bytes=state["peak_memory_bytes"],
            input_first=frozenset(state["input_first"]),
            scales=state.get("scales", {}),  # absent from checkpoints of 0.1
            by_magnitude=state.get("by_magnitude", {}),
            convolutions=state.get("convolutions", {}),
            reconstruction=tuple(BlockReport(**block) for block in state.get("reconstruction", ())),
            untrained=state.get("untrained", {}),
            tokens=state.get("tokens", 0),
            allocation_seconds=state.get("allocation_seconds", 0.0),
            writing_seconds=state.get("writing_seconds", 0.0),
        )


def warn_of_missed_counts(pruners: Mapping[str, Pruner], layers: Sequence[LayerReport]) -> None:
    """
    Warns if layers lost other counts of weights than allocated, so that the total sparsity is missed.

    Args:
        pruners: the pruner of every layer, by the name in its report.
        layers: the reports of the layers.
    """
    others = []
    for layer in layers:
        pattern, size = pruners[layer.name].pattern, math.prod(layer.shape)
        if removes_single_weights(pattern):
            wanted, removed = round(pattern.sparsity * size), round(layer.sparsity * size)
            others += [(layer.name, wanted, removed)] if wanted != removed else []
    if others:
        name, wanted, removed = others[0]
        warnings.warn(
            f"{name} was allocated {wanted} zeros and {type(pruners[name]).__name__} made {removed}; {len(others)} of "
            f"{len(layers)} layers differ, so the total is missed. A pruner that removes the same count from "
            'every row must have the attribute pool = "row"',
            stacklevel=3,
        )
