"""Wanda: scores a weight by its magnitude times the norm of its input feature."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.protocol import widened
from prune_callbacks.pruners.scored import ScorePruner
from prune_callbacks.solvers.statistics import InputNorm, Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import Pool


@dataclass(frozen=True)
class Wanda(ScorePruner):
    """Removes the least `|W_ij| * ||X_j||_2` of every output row (Sun et al. 2024). Survivors stay unchanged."""

    pattern: Pattern
    pool: ClassVar[Pool] = "row"  # type: ignore[misc]

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> InputNorm:
        """Makes an empty `InputNorm`, the sum of the input features' squares."""
        return InputNorm(in_features, device)

    def scores(self, weight: Float[Tensor, "out in"], statistic: Statistic | None = None) -> Float[Tensor, "out in"]:
        """Returns `|W_ij| * ||X_j||_2`, (out, in), in float32 or float64."""
        assert statistic is not None
        return widened(weight, statistic).abs() * statistic.squared_norm.sqrt()
