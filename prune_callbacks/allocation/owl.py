"""OWL: keeps blocks with more outliers denser."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_callbacks.allocation.counts import by_outliers, check_reach
from prune_callbacks.allocation.protocol import Values, check_single_weights, layer_sizes, with_counts
from prune_callbacks.pruners import Pruner
from prune_callbacks.solvers import InputNorm
from prune_callbacks.solvers.float64 import sum_in_float64
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class OWL:
    """
    An allocation that keeps blocks with more outliers denser (Yin et al. 2024); see `by_outliers`.

    A weight is an outlier if its Wanda score exceeds `threshold` times the mean score of its block.

    Args:
        threshold: the paper's M (5 or 7 there).
        reach: the paper's lambda; the sparsities of two layers differ by at most twice this.
    """

    threshold: float = 5.0
    reach: float = 0.08

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError for a pattern other than `Unstructured`, or if `reach` could lead out of [0, 1)."""
        check_single_weights("OWL", pattern)
        check_reach(pattern.sparsity, self.reach)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> InputNorm:
        """Returns empty input norms, for Wanda's score."""
        return InputNorm(in_features, device)

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """Computes the fraction of outliers in the block, and returns it for each of its layers."""
        scores = {n: w.float().abs() * statistics[n].squared_norm.to(w.device).sqrt() for n, w in weights.items()}
        count = sum(score.numel() for score in scores.values())
        mean = sum(float(sum_in_float64(score)) for score in scores.values()) / count
        outliers = sum(int((score > self.threshold * mean).count_nonzero()) for score in scores.values())
        return dict.fromkeys(weights, outliers / count)

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]:
        """Returns the pattern of every layer; see `by_outliers`."""
        sizes = layer_sizes(shapes)
        return with_counts(by_outliers(values, sizes, pattern.sparsity, self.reach), sizes, pattern)
