"""SensitivityAllocation: layers that cost more when pruned alone stay denser."""

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
    Layers that cost more when pruned alone stay denser; see `by_sensitivity`.

    Args:
        sensitivity: of every layer, by name, or of all experts in one tensor, by its name;
            `prune_callbacks.studies.sensitivity` measures it.
        lowest: sparsity that every layer has at least.
        highest: and at most.
    """

    sensitivity: Mapping[str, float] = field(repr=False)
    lowest: float = 0.0
    highest: float = 0.95

    @classmethod
    def from_file(cls, path: str | Path, lowest: float = 0.0, highest: float = 0.95) -> "SensitivityAllocation":
        """
        By a file that `sensitivity(path=...)` or `recipe=sensitivity` wrote, for layers.

        Raises:
            ValueError: there is no such file, or it is one for blocks.
        """
        results = read_sensitivities(path)
        if results["setting"]["unit"] != "layer":
            raise ValueError(f"{path} holds the sensitivities of blocks; those of layers are needed (unit=layer)")
        return cls({name: cell["increase"] for name, cell in results["cells"].items()}, lowest, highest)

    def check(self, pattern: Pattern) -> None:
        """Takes `Unstructured`."""
        check_single_weights("SensitivityAllocation", pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> None:
        """None: it is known already."""

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """What was given."""
        return {name: self.sensitivity[unit] for name in weights if (unit := unit_of(name, self.sensitivity))}

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]:
        """See `by_sensitivity`."""
        sizes = layer_sizes(shapes)
        return with_counts(by_sensitivity(values, sizes, pattern.sparsity, self.lowest, self.highest), sizes, pattern)
