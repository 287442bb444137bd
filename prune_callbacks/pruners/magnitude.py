"""Magnitude: removes the smallest weights."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.protocol import widened
from prune_callbacks.pruners.scored import ScorePruner
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class Magnitude(ScorePruner):
    """Removes the smallest weights, by `|W|` (Zhu & Gupta 2017). The pool is the layer. Needs no calibration."""

    pattern: Pattern

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> None:
        """Returns None: magnitudes need no calibration."""

    def scores(self, weight: Float[Tensor, "..."], statistic: Statistic | None = None) -> Float[Tensor, "..."]:
        """Returns `|W|`, in float32 or float64; takes any part of a weight too."""
        return widened(weight, None).abs()
