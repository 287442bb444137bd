"""ALPS (Meng et al. 2024): the mask and the weights sought together, by ADMM, then the exact weights for that mask."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.solvers.least_squares import MaskedLeastSquares
from prune_callbacks.solvers.linalg import DampedGram, ridge_inverse
from prune_callbacks.solvers.mrp import eq_14
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.solvers.split import product_dtype

PENALTIES = (0.35, 0.7)
"""The penalty of ADMM in two stages, as a fraction of each feature's diagonal in H."""

STEPS = 4
"""Steps with each penalty."""

START = 0.05
"""How near to the optimum, as a fraction of the loss, the solution is that the search starts from."""


def alps(
    weight: Float[Tensor, "out in"],
    system: DampedGram,
    keep_best: Choose,
    heights: Sequence[int] | None = None,
) -> Solved:
    """
    Prunes and compensates one layer, or several that share their input, stacked.

    Equivalent to ADMM on `min (X - W) H (X - W)^T` subject to `X = D` and D having the pattern, followed by exact
    least squares on the support of D. Differs from the paper's in what it costs: it starts from the solution for
    the mask of eq. 14 of MRP and from its multipliers, where the paper starts from the dense weights; it weighs the
    penalty by the diagonal of H, so that a few steps at two penalties do what takes the paper's schedule dozens; a
    step is one product with `(H + penalty)^-1`, in bfloat16 where that is faster, and no eigendecomposition is made.

    A layer's loss, with the damping's part or without, is never above that of `mrp_sm` with `block_size=None`, up to
    that function's tolerance: if the search does not surely win, that solution is computed too and compared.

    Args:
        weight: dense weights.
        system: the layers' damped Gram.
        keep_best: `Pattern.keep` of a pattern that leaves something of every row to compensate with.
        heights: the numbers of rows of the layers that are stacked in `weight`; None: it is one layer.
    """
    dense = weight * (~system.dead).to(weight)
    solution = MaskedLeastSquares(dense, system, heights)
    first = keep_best(eq_14(dense, system), 0)
    solution.restrict(first)
    solution.descend(START)
    # What MRP's loss is at least. The damping's part of it is not known as well, so it gets a margin.
    least = solution.loss - solution.certify()
    penalty = solution.penalty()
    keep = _search(dense, system, keep_best, solution.weight, first, solution.gradient * (~first).to(dense))
    solution.restrict(keep)
    solution.solve()
    found, loss, undamped = solution.weight, solution.loss, solution.undamped()
    if bool(((loss <= least) & (undamped <= least - 1.2 * penalty)).all()):
        return Solved(found, keep, undamped)
    del solution  # several arrays of the weights' size, and another such is coming
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
    """ADMM from a sparse solution and the multipliers of what is removed; the mask it ends with."""
    diagonal = system.matrix.diagonal()
    for penalty in PENALTIES:
        weights = penalty * diagonal
        inverse = ridge_inverse(system.matrix, weights).to(product_dtype(dense))
        for _ in range(STEPS):
            force = (dense - sparse).mul_(weights).add_(multiplier)
            # X = W - (V + weights (W - D)) (H + weights)^-1 is the least of the augmented Lagrangian; X + V / weights
            # is then split: its largest are the new D, the rest the new V.
            x = torch.addcdiv(dense, multiplier, weights).sub_(force.to(inverse.dtype) @ inverse)
            keep = keep_best(x.square().mul_(diagonal), 0)
            sparse = keep.to(x.dtype).mul_(x)  # a product with booleans takes several times as long
            multiplier = x.sub_(sparse).mul_(weights)
    return keep
