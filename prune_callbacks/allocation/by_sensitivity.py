"""SensitivityAllocation: keeps layers denser whose pruning alone costs more."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_callbacks.allocation.counts import by_sensitivity
from prune_callbacks.allocation.protocol import (
    Values,
    check_single_weights,
    layer_sizes,
    read_sensitivities,
    unit_of,
    with_counts,
)
from prune_callbacks.pruners import Pruner
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class SensitivityAllocation:
    """
    An allocation that keeps layers denser whose pruning alone costs more; see `by_sensitivity`.

    Args:
        sensitivity: the sensitivity of every layer, by its name, or of all experts in one tensor, by the tensor's name;
            `prune_callbacks.studies.sensitivity` measures it.
        lowest: the least sparsity of a layer.
        highest: the largest sparsity of a layer.
    """

    sensitivity: Mapping[str, float] = field(repr=False)
    lowest: float = 0.0
    highest: float = 0.95

    @classmethod
    def from_file(cls, path: str | Path, lowest: float = 0.0, highest: float = 0.95) -> "SensitivityAllocation":
        """
        Makes the allocation from a file for layers that `sensitivity(path=...)` or `recipe=sensitivity` wrote.

        Raises:
            ValueError: there is no such file, or it holds the sensitivities of blocks.
        """
        results = read_sensitivities(path)
        if results["setting"]["unit"] != "layer":
            raise ValueError(f"{path} holds the sensitivities of blocks; those of layers are needed (unit=layer)")
        return cls({name: cell["increase"] for name, cell in results["cells"].items()}, lowest, highest)

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError for a pattern other than `Unstructured`."""
        check_single_weights("SensitivityAllocation", pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> None:
        """Returns None: the sensitivities are given, so no pass over the dense model is needed."""

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """Returns the given sensitivity of every layer that has one."""
        return {name: self.sensitivity[unit] for name in weights if (unit := unit_of(name, self.sensitivity))}

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]:
        """Returns the pattern of every layer; see `by_sensitivity`."""
        sizes = layer_sizes(shapes)
        return with_counts(by_sensitivity(values, sizes, pattern.sparsity, self.lowest, self.highest), sizes, pattern)
