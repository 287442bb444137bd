"""SparseGPT (Frantar & Alistarh 2023): prunes and compensates in one sweep over the columns."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.precision import full_precision
from prune_callbacks.solvers.solved import Solved, sum_by_layer

Choose = Callable[[Float[Tensor, "out columns"], int], Bool[Tensor, "out columns"]]
"""Returns the mask of a slice of columns, given its scores or current weights and the index of its first column."""

Settle = Callable[[int, Float[Tensor, "columns out"], Bool[Tensor, " out"]], Float[Tensor, " out"]]
"""
Returns the final values of a column, given its index, its mask, and the current weights from it on (one column a row).

Weights beyond the current block do not yet include the block's compensation.
"""


@full_precision()
def sparsegpt(
    weight: Float[Tensor, "out in"],
    system: DampedGram,
    keep_best: Choose,
    step: int,
    block_size: int,
    heights: Sequence[int] | None = None,
) -> Solved:
    """
    Prunes and compensates one layer.

    Equivalent to Optimal Brain Surgeon applied to one column after another, left to right, with a column's error
    compensated in the columns on its right only (Algorithm 1 of the paper). The mask of `step` columns (a block, or a
    group of m for N:M) is chosen when the sweep reaches them, by the score `W_ij^2 / U_jj^2`.

    Args:
        weight: dense weights, (out, in), float32 or float64; layers that share their input may be stacked.
        system: their damped Gram.
        keep_best: `Pattern.keep`.
        step: columns whose mask is chosen together.
        block_size: columns that are updated together; a multiple of `step`.
        heights: the numbers of rows of the layers that are stacked in `weight`; None: a single layer.
    """
    diagonal = system.inverse_factor.diagonal()

    def choose(current: Tensor, start: int) -> Tensor:
        return keep_best((current / diagonal[start : start + current.shape[1]]).square(), start)

    return sweep(weight, system, choose, step, block_size, heights=heights)


def masked(j: int, ahead: Float[Tensor, "columns out"], kept: Bool[Tensor, " out"]) -> Float[Tensor, " out"]:
    """Returns the first column of `ahead` with its removed weights zeroed: the `Settle` of pruning alone."""
    return ahead[0] * kept


def sweep(
    weight: Float[Tensor, "out in"],
    system: DampedGram,
    choose: Choose,
    step: int,
    block_size: int,
    settle: Settle = masked,
    heights: Sequence[int] | None = None,
) -> Solved:
    """
    Sets one column after another to its final values; `choose` gives the mask of every `step` columns on the way.

    Equivalent to the loop over columns that updates all columns on the right after each. Here the columns right of a
    block of `block_size` are updated together, by one matrix product.

    The loss needs no further product. With the errors `E_j = (w_j - settled_j) / U_jj` the change of the weights is
    `d = -E U`, and `U H U^T = I`, so that `d H d^T = |E|^2`. Subtracting the damping term gives `d G d^T`.

    Args:
        weight: dense weights, (out, in), float32 or float64.
        system: their damped Gram.
        choose: returns the mask of a slice of columns.
        step: columns whose mask is chosen together.
        block_size: columns that are updated together; a multiple of `step`.
        settle: returns the final values of a column.
        heights: the numbers of rows of the layers that are stacked in `weight`; None: a single layer.
    """
    factor = system.inverse_factor
    # Transposed, so that a column of the weight is contiguous in memory.
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    columns[system.dead] = 0
    cost = columns.new_zeros(columns.shape[1])
    keep = torch.zeros_like(columns, dtype=torch.bool)
    for a in range(0, len(columns), block_size):
        b = min(a + block_size, len(columns))
        errors = sweep_block(columns[a:], factor[a:b, a:b], keep[a:b], choose, step, settle, a)
        columns[b:].addmm_(factor[a:b, b:].T, errors, alpha=-1)
        cost += torch.linalg.vecdot(errors, errors, dim=0)
        change = (weight[:, a:b].T - columns[a:b]) * ~system.dead[a:b, None]
        cost -= system.ridge * torch.linalg.vecdot(change, change, dim=0)
    return Solved(columns.T.contiguous(), keep.T.contiguous(), sum_by_layer(cost, heights))


def sweep_block(
    columns: Float[Tensor, "columns out"],
    factor: Float[Tensor, "block block"],
    keep: Bool[Tensor, "block out"],
    choose: Choose,
    step: int,
    settle: Settle,
    start: int,
) -> Float[Tensor, "block out"]:
    """
    Sweeps one block, in place; returns the errors, which the caller compensates in the columns after the block.

    Args:
        columns: current weights from the block on, one column per row; only those of the block change.
        factor: the block's diagonal block of `U`.
        keep: the block's mask, which this function fills in.
        choose: see `sweep`.
        step: see `sweep`.
        settle: see `sweep`.
        start: index of the block's first column.
    """
    size, diagonal = len(factor), factor.diagonal()
    block, errors = columns[:size], torch.empty_like(columns[:size])
    for j in range(size):
        if j % step == 0:
            end = min(j + step, size)
            keep[j:end] = choose(block[j:end].T, start + j).T
        settled = settle(start + j, columns[j:], keep[j])
        error = (block[j] - settled).div_(diagonal[j])
        block[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
        block[j] = settled
        errors[j] = error
    return errors
