"""RIA: scores a weight by its shares of row and column, times the norm of its input feature."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.protocol import widened
from prune_callbacks.pruners.scored import ScorePruner
from prune_callbacks.solvers.statistics import InputNorm, Statistic
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class RIA(ScorePruner):
    """
    Removes weights of least relative importance times activations (Zhang et al. 2024). Survivors stay unchanged.

    "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models".

    The score is `(|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^power`. The pool is the layer, as in the
    authors' code.

    Args:
        pattern: the allowed masks, with the sparsity.
        power: the exponent of the input norms, the paper's a.
    """

    pattern: Pattern
    power: float = 0.5

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> InputNorm:
        """Makes an empty `InputNorm`, the sum of the input features' squares."""
        return InputNorm(in_features, device)

    def scores(self, weight: Float[Tensor, "out in"], statistic: Statistic | None = None) -> Float[Tensor, "out in"]:
        """Returns the score above, (out, in), in float32 or float64; rows and columns of zeros score 0."""
        assert statistic is not None
        size = widened(weight, statistic).abs()
        least = torch.finfo(size.dtype).tiny
        relative = size / size.sum(0).clamp_min(least) + size / size.sum(1, keepdim=True).clamp_min(least)
        return relative * statistic.squared_norm.sqrt() ** self.power
