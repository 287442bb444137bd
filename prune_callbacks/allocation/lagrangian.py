"""LagrangianAllocation: minimises the sum of layer-wise losses for a total sparsity."""

import math
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
from prune_callbacks.anatomy.names import naming
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import with_pattern
from prune_callbacks.solvers import Gram
from prune_callbacks.solvers.linalg import quadratic_form
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import at_sparsity, keeping, kept_of_group


def importance_of(increase: Mapping[str, float], proxy: Mapping[str, float], what: str) -> dict[str, float]:
    """
    Returns the factors that convert losses into measured increases of perplexity; see `Sensitivity`.

    Raises:
        ValueError: nothing is sensitive, or a measurement is not finite; `what` names where they are from.
    """
    wrong = [name for name, value in increase.items() if not math.isfinite(value) or not math.isfinite(proxy[name])]
    if wrong:
        raise ValueError(f"{what} has no finite perplexity where {wrong[0]} is pruned: measure at a lower sparsity")
    importance = {name: value / max(proxy[name], 1e-12) for name, value in increase.items()}
    largest = max(importance.values(), default=0.0)
    if largest <= 0:
        raise ValueError(f"{what} has no layer or block that is sensitive")
    return {name: max(value, largest / 1000) for name, value in importance.items()}


@dataclass(frozen=True)
class LagrangianAllocation:
    """
    An allocation of least sum of layer-wise losses for the total; see `by_losses` and, for N:M, `mix_of_groups`.

    The pruner prunes every layer on the dense model's inputs at several sparsities. A layer's loss is taken relative to
    the squared norm of its output. N:M patterns are mixed: every layer gets its own `n`, and the total is at least as
    sparse as the given pattern.

    Equal relative losses in different blocks cost the model different amounts, because later blocks inherit the errors
    of earlier ones. `importance` weights the losses by these costs.

    Args:
        importance: the factor of a layer's loss, by the name of the layer, of an expert's tensor or of the block; an
            empty mapping: 1. The factors of `from_file` convert losses into measured increases of perplexity.
        reach: the largest distance of a layer's sparsity from the target; sparsities also lie in [0, 0.95].
        points: the number of sparsities on either side of the target at which losses are measured.

    Raises:
        ValueError: `reach` lies outside (0, 1), or `points` is below 1.
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
        Makes the allocation with importances from a file that `sensitivity(path=...)` or `recipe=sensitivity` wrote.

        The file may hold the sensitivities of layers or of blocks.

        Raises:
            ValueError: there is no such file, or no sensitivity in it is positive.
        """
        cells = read_sensitivities(path)["cells"]
        increase, proxy = ({name: cell[key] for name, cell in cells.items()} for key in ("increase", "proxy"))
        return cls(reach, points, importance_of(increase, proxy, str(path)))

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError for a pattern other than `Unstructured` and `NM`."""
        group = kept_of_group(pattern)
        if group is None:
            check_single_weights("LagrangianAllocation", pattern)
        elif not hasattr(pattern, "keeping"):
            raise ValueError(
                f"LagrangianAllocation mixes patterns that keep other numbers of every {group[1]} weights, and "
                f"{pattern!r} has no method keeping(n) that makes them"
            )

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """Returns an empty Gram, from which losses are computed."""
        return Gram(in_features, device)

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """Measures the curve of every layer: (sparsity, relative loss) at every point."""
        return {name: self._curve(pruner, name, weight, statistics[name]) for name, weight in weights.items()}

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]:
        """Returns the pattern of every layer; see `by_losses` and `mix_of_groups`."""
        sizes = layer_sizes(shapes)
        values = {name: [(s, self._importance(name) * loss) for s, loss in values[name]] for name in values}
        group = kept_of_group(pattern)
        if group is not None:
            m = group[1]
            losses = {name: {round((1 - s) * m): loss for s, loss in curve} for name, curve in values.items()}
            mixed = mix_of_groups(losses, sizes, m, pattern.sparsity)
            return {name: keeping(pattern, n) for name, n in mixed.items()}
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
            return [keeping(pattern, n) for n in range(1, group[1])]
        (low, high), target = self._bounds(pattern), pattern.sparsity
        below = torch.linspace(low, target, self.points + 1, dtype=torch.float64, device="cpu")[:-1].tolist()
        above = torch.linspace(target, high, self.points + 1, dtype=torch.float64, device="cpu").tolist()
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
