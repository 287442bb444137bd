"""LagrangianAllocation: the least sum of layer-wise losses under the total."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_callbacks.allocation.counts import by_losses, mix_of_groups
from prune_callbacks.allocation.protocol import (
    Values,
    check_single_weights,
    layer_sizes,
    read_sensitivities,
    unit_of,
    with_counts,
)
from prune_callbacks.anatomy.naming import naming
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import with_pattern
from prune_callbacks.solvers import Gram
from prune_callbacks.solvers.linalg import quadratic_form
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import NM, Pattern
from prune_callbacks.sparsity.questions import at_sparsity, kept_of_group


@dataclass(frozen=True)
class LagrangianAllocation:
    """
    The least sum of layer-wise losses under the total; see `by_losses` and, for N:M, `mix_of_groups`.

    Every layer is pruned on the dense model's inputs at several sparsities, by the pruner itself, and its loss taken
    relative to the squared norm of its output. N:M patterns are mixed: every layer gets an `n` of its own, the total is
    at least as sparse.

    Relative losses of different blocks do not weigh the same: what the first ones get wrong, all others inherit. With
    `importance` losses are in units of what they cost.

    Args:
        importance: what a layer's loss is multiplied by, by the name of the layer, of an expert's tensor or of the
            block; empty: by 1. Those of `from_file` turn losses into increases of perplexity, as measured.
        reach: layers' sparsities lie within so much of the target (and in [0, 0.95]).
        points: sparsities at which losses are measured, on either side of the target.
    """

    reach: float = 0.15
    points: int = 3
    importance: Mapping[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.reach < 1 or self.points < 1:
            raise ValueError(
                f"LagrangianAllocation: reach must lie in (0, 1) and points be 1 or more, got {self.reach} and "
                f"{self.points}"
            )

    @classmethod
    def from_file(cls, path: str | Path, reach: float = 0.15, points: int = 3) -> "LagrangianAllocation":
        """
        Losses weighted by what `sensitivity(path=...)` or `recipe=sensitivity` measured, for layers or for blocks.

        Raises:
            ValueError: there is no such file, or nothing in it is sensitive.
        """
        cells = read_sensitivities(path)["cells"]
        importance = {name: cell["increase"] / max(cell["proxy"], 1e-12) for name, cell in cells.items()}
        largest = max(importance.values(), default=0.0)
        if largest <= 0:
            raise ValueError(f"{path} has no layer or block that is sensitive")
        return cls(reach, points, {name: max(value, largest / 1000) for name, value in importance.items()})

    def check(self, pattern: Pattern) -> None:
        """Takes `Unstructured` and `NM`."""
        if kept_of_group(pattern) is None:
            check_single_weights("LagrangianAllocation", pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram that losses need."""
        return Gram(in_features, device)

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """(sparsity, relative loss) of every layer at every point."""
        return {name: self._curve(pruner, name, weight, statistics[name]) for name, weight in weights.items()}

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]:
        """See `by_losses` and `mix_of_groups`."""
        sizes = layer_sizes(shapes)
        values = {name: [(s, self._importance(name) * loss) for s, loss in values[name]] for name in values}
        group = kept_of_group(pattern)
        if group is not None:
            m = group[1]
            losses = {name: {round((1 - s) * m): loss for s, loss in curve} for name, curve in values.items()}
            mixed = mix_of_groups(losses, sizes, m, pattern.sparsity)
            return {name: NM(n, m) for name, n in mixed.items()}
        return with_counts(by_losses(values, sizes, pattern.sparsity), sizes, pattern)

    def _importance(self, name: str) -> float:
        if not self.importance:
            return 1.0
        unit = unit_of(name, self.importance)
        if unit is None:
            raise ValueError(f"importance has neither {name} nor its block")
        return self.importance[unit]

    def _bounds(self, pattern: Pattern) -> tuple[float, float]:
        return max(0.0, pattern.sparsity - self.reach), min(0.95, pattern.sparsity + self.reach)

    def _patterns(self, pattern: Pattern) -> list[Pattern]:
        group = kept_of_group(pattern)
        if group is not None:
            return [NM(n, group[1]) for n in range(1, group[1])]
        (low, high), target = self._bounds(pattern), pattern.sparsity
        below = torch.linspace(low, target, self.points + 1, dtype=torch.float64)[:-1].tolist()
        above = torch.linspace(target, high, self.points + 1, dtype=torch.float64).tolist()
        return [at_sparsity(pattern, s) for s in sorted({*below, *above})]

    def _curve(self, pruner: Pruner, name: str, weight: Tensor, statistic: Statistic) -> list[tuple[float, float]]:
        assert isinstance(statistic, Gram)
        dense = weight.to(statistic.matrix)
        output = quadratic_form(dense, statistic.matrix)
        curve = []
        for pattern in self._patterns(pruner.pattern):
            with naming(name):
                pruned = with_pattern(pruner, pattern).prune(weight, statistic)
            loss = pruned.loss
            if loss is None:
                loss = max(0.0, quadratic_form(pruned.weight.to(statistic.matrix) - dense, statistic.matrix))
            sparsity = 1 - int(pruned.keep.count_nonzero()) / pruned.keep.numel()
            curve.append((sparsity, loss / output if output > 0 else 0.0))
        return curve
