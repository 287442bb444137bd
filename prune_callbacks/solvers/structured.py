"""Removes whole groups of a layer's input features, and solves for the weights of the remaining ones."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.float64 import in_float64
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.precision import full_precision


@full_precision()
def cheapest_units(
    weight: Float[Tensor, "out in"], system: DampedGram, width: int, pools: int, removed: int
) -> Bool[Tensor, " units"]:
    """
    Returns the keep mask over units of `width` neighbouring input features that costs least after compensation.

    Equivalent to repeating two steps (Optimal Brain Surgeon for structures; ZipLM, Kurtic et al. 2023). First compute,
    for every remaining unit S, the exact loss of removing it from the weights compensated so far,
    `tr(W_S [(H^-1)_SS]^-1 W_S^T)`. Then remove the unit of least loss; of equal losses, the last unit. Dead features
    cost nothing.

    Args:
        weight: the weight, (out, in), of the layer that reads the features; float32 or float64.
        system: its damped Gram.
        width: features of a unit: 1, or the size of an attention head.
        pools: number of equal runs of consecutive units; each loses the same number of units.
        removed: units to remove from each pool.
    """
    current = weight.masked_fill(system.dead, 0)
    inverse = system.inverse_factor.T @ system.inverse_factor
    units = weight.shape[1] // width
    keep = torch.ones(units, dtype=torch.bool, device=weight.device)
    for _ in range(pools * removed):
        losses = _losses(current, inverse, width)
        gone = (~keep).view(pools, -1)
        losses[(gone | (gone.sum(1, keepdim=True) == removed)).flatten()] = torch.inf
        unit = units - 1 - int(losses.flip(0).argmin())
        keep[unit] = False
        part = slice(unit * width, (unit + 1) * width)
        # This rank-`width` update makes the inverse that of the Gram without the unit.
        rows = torch.linalg.solve(inverse[part, part], inverse[part])
        current -= current[:, part] @ rows
        inverse -= inverse[:, part] @ rows
        current[:, part] = 0
        inverse[part], inverse[:, part] = 0, 0
        inverse[part, part] = torch.eye(width, dtype=weight.dtype, device=weight.device)
    return keep


def _losses(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Computes the exact loss of removing each unit, (units,)."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    blocks = inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    parts = weight.T.unflatten(0, (-1, width))  # units, width, out
    losses: Tensor = (torch.linalg.solve(blocks, parts) * parts).sum((1, 2))
    return losses


@full_precision()
def least_squares_on(
    weight: Float[Tensor, "out in"], system: DampedGram, kept: Bool[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """
    Returns the weights on the `kept` features whose output is nearest to that of the dense layer; zero elsewhere.

    Equivalent to `w_S = H_SS^-1 (H w)_S` for every row (MRP's eq. 13 with one set for all rows), by one factorisation
    in float64. The result has the weight's dtype. Weights of dead features become 0.
    """
    matrix, dense = in_float64(system.matrix), in_float64(weight.masked_fill(system.dead, 0))
    kept = kept.to(matrix.device)
    right = matrix[kept] @ dense.T
    solved = torch.zeros_like(weight)
    solved[:, kept] = torch.linalg.solve(matrix[kept][:, kept], right).T.to(weight.dtype).to(weight.device)
    return solved
