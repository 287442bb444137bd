"""Rules by which every layer gets a sparsity of its own, from what was measured of the dense model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from prune_callbacks.allocation.counts import by_losses, by_outliers, by_sensitivity, check_reach, mix_of_groups
from prune_callbacks.anatomy.naming import inside, naming
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import with_pattern
from prune_callbacks.solvers import Gram, InputNorm
from prune_callbacks.solvers.linalg import quadratic_form
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import NM, Pattern
from prune_callbacks.sparsity.questions import at_sparsity, kept_of_group, removes_single_weights

Values = Mapping[str, Any]
"""What was measured of every layer."""


@runtime_checkable
class Allocation(Protocol):
    """
    Spreads a pattern's sparsity over layers, unevenly, with the same total.

    `statistic` makes what the layers' inputs are streamed into on a pass over the dense model; None: no pass is needed.
    `measure` is asked for the values of every block's layers, with their statistics, `choose` at the end for the
    patterns of all.
    """

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError for a pattern whose sparsity cannot be spread so."""

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram | InputNorm | None: ...

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]: ...

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]: ...


@dataclass(frozen=True)
class OWL:
    """
    Blocks with more outliers stay denser (Yin et al. 2024); see `by_outliers`.

    A weight is an outlier whose Wanda score exceeds `threshold` times the mean of its block.

    Args:
        threshold: the paper's M (5 or 7 there).
        reach: the paper's lambda: sparsities lie within twice of it of each other.
    """

    threshold: float = 5.0
    reach: float = 0.08

    def check(self, pattern: Pattern) -> None:
        """Takes `Unstructured`."""
        _check_unstructured("OWL", pattern)
        check_reach(pattern.sparsity, self.reach)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> InputNorm:
        """The norms that Wanda's score needs."""
        return InputNorm(in_features, device)

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """The block's share of outliers, for each of its layers."""
        scores = {n: w.float().abs() * statistics[n].squared_norm.to(w.device).sqrt() for n, w in weights.items()}
        count = sum(score.numel() for score in scores.values())
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores.values()) / count
        outliers = sum(int((score > self.threshold * mean).count_nonzero()) for score in scores.values())
        return dict.fromkeys(weights, outliers / count)

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]:
        """See `by_outliers`."""
        sizes = layer_sizes(shapes)
        return with_counts(by_outliers(values, sizes, pattern.sparsity, self.reach), sizes, pattern)


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
        cells = _measured(path)["cells"]
        importance = {name: cell["increase"] / max(cell["proxy"], 1e-12) for name, cell in cells.items()}
        largest = max(importance.values(), default=0.0)
        if largest <= 0:
            raise ValueError(f"{path} has no layer or block that is sensitive")
        return cls(reach, points, {name: max(value, largest / 1000) for name, value in importance.items()})

    def check(self, pattern: Pattern) -> None:
        """Takes `Unstructured` and `NM`."""
        if kept_of_group(pattern) is None:
            _check_unstructured("LagrangianAllocation", pattern)

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
        unit = _unit_of(name, self.importance)
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
        results = _measured(path)
        if results["setting"]["unit"] != "layer":
            raise ValueError(f"{path} holds the sensitivities of blocks; those of layers are needed (unit=layer)")
        return cls({name: cell["increase"] for name, cell in results["cells"].items()}, lowest, highest)

    def check(self, pattern: Pattern) -> None:
        """Takes `Unstructured`."""
        _check_unstructured("SensitivityAllocation", pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> None:
        """None: it is known already."""

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """What was given."""
        return {name: self.sensitivity[unit] for name in weights if (unit := _unit_of(name, self.sensitivity))}

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]:
        """See `by_sensitivity`."""
        sizes = layer_sizes(shapes)
        return with_counts(by_sensitivity(values, sizes, pattern.sparsity, self.lowest, self.highest), sizes, pattern)


def _unit_of(name: str, units: Iterable[str]) -> str | None:
    """The smallest of the units that a layer is in: itself, the tensor that an expert is in, or the block."""
    return max((unit for unit in units if inside(name, unit)), key=len, default=None)


def _measured(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"no sensitivities at {path}; python train.py recipe=sensitivity measures them")
    results: dict[str, Any] = json.loads(Path(path).read_text())
    if not {"unit"} <= set(results.get("setting", {})) or "cells" not in results:
        raise ValueError(f"{path} holds no sensitivities; python train.py recipe=sensitivity writes sensitivity.json")
    return results


def layer_sizes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Weights of every layer."""
    return {name: rows * columns for name, (rows, columns) in shapes.items()}


def with_counts(removed: Mapping[str, int], sizes: Mapping[str, int], pattern: Pattern) -> dict[str, Pattern]:
    """The pattern for every layer, with the sparsity that removes so many of its weights."""
    return {name: at_sparsity(pattern, count / sizes[name]) for name, count in removed.items()}


def _check_unstructured(name: str, pattern: Pattern) -> None:
    if not removes_single_weights(pattern):
        raise ValueError(
            f"{name} spreads the sparsity of Unstructured over layers and cannot spread {pattern}: its weights do not "
            "go one by one"
        )
