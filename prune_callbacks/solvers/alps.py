"""ALPS (Meng et al. 2024): searches mask and weights together by ADMM, then solves for the weights of that mask."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.solvers.least_squares import MaskedLeastSquares
from prune_callbacks.solvers.linalg import DampedGram, ridge_inverse
from prune_callbacks.solvers.mrp import eq_14
from prune_callbacks.solvers.precision import full_precision
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.solvers.split import product_dtype

PENALTIES = (0.35, 0.7)
"""The penalties of ADMM's two stages, as fractions of each feature's diagonal entry of H."""

STEPS = 4
"""ADMM steps with each penalty."""

START = 0.05
"""The tolerance of the solution that the search starts from: its distance from the optimum, relative to the loss."""


@full_precision()
def alps(
    weight: Float[Tensor, "out in"],
    system: DampedGram,
    keep_best: Choose,
    heights: Sequence[int] | None = None,
) -> Solved:
    """
    Prunes and compensates one layer, or several that share their input, stacked.

    Equivalent to ADMM on `min (X - W) H (X - W)^T` subject to `X = D`, with D having the pattern, followed by exact
    least squares on the support of D. It is cheaper than the paper's ADMM in three ways. It starts from the solution
    for the mask of MRP's eq. 14 and its multipliers; the paper starts from the dense weights. It scales the penalty by
    the diagonal of H, so that a few steps at two penalties replace dozens of steps of the paper's schedule. A step is
    one product with `(H + penalty)^-1`, in bfloat16 where that is faster, without an eigendecomposition.

    A layer's loss, with or without the damping term, is never above that of `mrp_sm` with `block_size=None`, up to
    that function's tolerance. Unless a bound proves this, the `mrp_sm` solution is computed too and the better kept.

    Args:
        weight: dense weights, (out, in), float32 or float64.
        system: the layers' damped Gram.
        keep_best: `Pattern.keep` of a pattern that never removes a whole row, which could not be compensated.
        heights: the numbers of rows of the layers that are stacked in `weight`; None: a single layer.
    """
    dense = weight * (~system.dead).to(weight)
    solution = MaskedLeastSquares(dense, system, heights)
    first = keep_best(eq_14(dense, system), 0)
    solution.restrict(first)
    solution.descend(START)
    # A lower bound on MRP's loss. Its damping term is known less precisely, hence the margin below.
    least = solution.loss - solution.certify()
    penalty = solution.penalty()
    keep = _search(dense, system, keep_best, solution.weight, first, solution.gradient * (~first).to(dense))
    solution.restrict(keep)
    solution.solve()
    found, loss, undamped = solution.weight, solution.loss, solution.undamped()
    if bool(((loss <= least) & (undamped <= least - 1.2 * penalty)).all()):
        return Solved(found, keep, undamped)
    del solution  # frees several arrays of the weights' size before the next such solution
    other = MaskedLeastSquares(dense, system, heights)
    other.restrict(first)
    other.solve()
    better = (loss <= other.loss) & (undamped <= other.undamped())
    rows = other.by_row(better)[:, None]
    losses = torch.where(better, undamped, other.undamped())
    return Solved(torch.where(rows, found, other.weight), torch.where(rows, keep, first), losses)


def _search(
    dense: Tensor, system: DampedGram, keep_best: Choose, sparse: Tensor, keep: Tensor, multiplier: Tensor
) -> Tensor:
    """Runs ADMM from a sparse solution and the multipliers of its removed weights; returns the final mask."""
    diagonal = system.matrix.diagonal()
    for penalty in PENALTIES:
        weights = penalty * diagonal
        inverse = ridge_inverse(system.matrix, weights).to(product_dtype(dense))
        for _ in range(STEPS):
            force = (dense - sparse).mul_(weights).add_(multiplier)
            # X = W - (V + weights (W - D)) (H + weights)^-1 minimises the augmented Lagrangian. X + V / weights is
            # then split: its largest entries are the new D, the others give the new V.
            x = torch.addcdiv(dense, multiplier, weights).sub_(force.to(inverse.dtype) @ inverse)
            keep = keep_best(x.square().mul_(diagonal), 0)
            sparse = keep.to(x.dtype).mul_(x)  # a product with booleans is several times slower
            multiplier = x.sub_(sparse).mul_(weights)
    return keep
