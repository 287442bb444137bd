"""MRP, the multiple removal problem (Zhao et al. 2024): remove whole sets of weights, compensate exactly."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.linalg import DampedGram, masked_least_squares
from prune_callbacks.sparsity import Pattern


def mrp_sm(
    weight: Float[Tensor, "out in"], system: DampedGram, pattern: Pattern, block_size: int | None
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """
    Prunes and compensates one layer: mask S, compensation M of the paper.

    Equivalent to choosing, block of columns after block of columns, the mask of the largest
    `W_ij^2 / [H^-1]_jj` (eq. 14), and after each block solving eq. 13 with the mask of all blocks so far, which
    changes **all** unpruned weights, those of earlier and later blocks included.

    Args:
        weight: dense weights.
        system: the layer's damped Gram.
        pattern: any pattern that leaves something of every row to compensate with.
        block_size: columns per block; None is the paper's `S = all`.

    Returns:
        The new weights and the mask, both (out, in); the arguments are left as they are.
    """
    inverse_diagonal = system.inverse_diagonal
    dense = weight.masked_fill(system.dead, 0)
    current = dense
    columns, eps = weight.shape[1], torch.finfo(weight.dtype).eps
    step = columns if block_size is None else block_size
    keep = torch.ones_like(weight, dtype=torch.bool)
    for a in range(0, columns, step):
        b = min(a + step, columns)
        keep[:, a:b] = pattern.keep(current[:, a:b].square() / inverse_diagonal[a:b], start=a)
        # What lies between two blocks only serves to score the next block's columns.
        tolerance = eps if b == columns else eps**0.75
        current = masked_least_squares(dense, system, keep, current, tolerance)
    return current, keep
