"""Magnitude and Wanda: a score and a pattern, no weight is changed."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.protocol import (
    Pool,
    Pruned,
    as_pruned,
    check_pattern,
    check_statistic,
    check_weight,
    widened,
)
from prune_callbacks.solvers.statistics import InputNorm, Statistic
from prune_callbacks.sparsity import Pattern, Unstructured


@dataclass(frozen=True)
class Magnitude:
    """Removes the smallest weights, by `|W|` (Zhu & Gupta 2017). The pool is the layer. Needs no calibration."""

    pattern: Pattern

    def __post_init__(self) -> None:
        check_pattern("Magnitude", self.pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> None:
        """None: magnitudes need no calibration."""
        return

    def scores(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`|W|`, in float32 or float64; of any part of a weight, too."""
        return widened(weight, None).abs()

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None = None) -> Pruned:
        """Equivalent to sorting `|W|` and zeroing the smallest; see `Pruner`."""
        check_weight(weight, self.pattern)
        keep = self.pattern.keep(self.scores(weight))
        return as_pruned(weight, weight, keep, statistic)


@dataclass(frozen=True)
class Wanda:
    """
    Removes by `|W_ij| * ||X_j||_2`, within each output row (Sun et al. 2024). No weight is changed.

    A pattern of rows, columns or blocks sums this score over the structure.
    """

    pattern: Pattern
    pool: ClassVar[Pool] = "row"

    def __post_init__(self) -> None:
        check_pattern("Wanda", self.pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> InputNorm:
        """The norms of the input features."""
        return InputNorm(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """Equivalent to sorting each row's scores and zeroing the smallest; see `Pruner`."""
        check_weight(weight, self.pattern)
        known = check_statistic("Wanda", weight, statistic)
        pattern = self.pattern
        if isinstance(pattern, Unstructured) and pattern.per is None:
            pattern = replace(pattern, per=self.pool)
        keep = pattern.keep(widened(weight, known).abs() * known.squared_norm.sqrt())
        return as_pruned(weight, weight, keep, known)
