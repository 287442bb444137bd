"""SparseGPT (Frantar & Alistarh 2023): one sweep over the columns, pruning and compensating as it goes."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.solved import Solved, sum_by_layer

Choose = Callable[[Float[Tensor, "out columns"], int], Bool[Tensor, "out columns"]]
"""The mask of a slice of columns, from its scores or current weights and the number of its first column."""

Settle = Callable[[int, Float[Tensor, "columns out"], Bool[Tensor, " out"]], Float[Tensor, " out"]]
"""
What a column becomes: from its number, the current weights from it on, one column a row, and its mask.

Weights beyond the block that is swept are as they were before it.
"""


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

    Equivalent to Optimal Brain Surgeon applied to one column after another, left to right, with the error of
    a column pushed onto the columns on its right only (Algorithm 1 of the paper). The mask of `step` columns (a
    block, or a group of m for N:M) is chosen when the sweep reaches them, by the score `W_ij^2 / U_jj^2`.

    Args:
        weight: dense weights; layers that share their input may be stacked.
        system: their damped Gram.
        keep_best: `Pattern.keep`.
        step: columns whose mask is chosen together.
        block_size: columns that are updated together; a multiple of `step`.
        heights: the numbers of rows of the layers that are stacked in `weight`; None: it is one layer.
    """
    diagonal = system.inverse_factor.diagonal()

    def choose(current: Tensor, start: int) -> Tensor:
        return keep_best((current / diagonal[start : start + current.shape[1]]).square(), start)

    return sweep(weight, system, choose, step, block_size, heights=heights)


def masked(j: int, ahead: Float[Tensor, "columns out"], kept: Bool[Tensor, " out"]) -> Float[Tensor, " out"]:
    """The column with its removed weights zero."""
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
    Settles one column after another, by what `choose` says of every `step` columns when the sweep reaches them.

    Equivalent to the loop over columns that updates all columns on the right at once. Here the columns right of a
    block of `block_size` are updated together, as one matrix product.

    The loss costs no product: with the errors `E_j = (w_j - settled_j) / U_jj` the change of the weights is `-E U`, and
    `U H U^T = I`, so that `d H d^T = |E|^2`. Less the damping's part that is `d G d^T`.
    """
    factor = system.inverse_factor
    # Transposed, so that a column of the weight is contiguous in memory.
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    columns[system.dead] = 0
    before, cost = columns.clone(), columns.new_zeros(columns.shape[1])
    keep = torch.zeros_like(columns, dtype=torch.bool)
    for a in range(0, len(columns), block_size):
        b = min(a + block_size, len(columns))
        errors = sweep_block(columns[a:], factor[a:b, a:b], keep[a:b], choose, step, settle, a)
        columns[b:].addmm_(factor[a:b, b:].T, errors, alpha=-1)
        cost += torch.linalg.vecdot(errors, errors, dim=0)
    cost -= system.ridge * before.sub_(columns).square_().sum(0)
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
    The part of a sweep inside of a block, in place; returns the errors that are still to be pushed beyond it.

    Args:
        columns: current weights from the block on, one column a row; only the block's change.
        factor: the square of `U` that belongs to the block.
        keep: the block's mask, which is filled in.
        choose: see `sweep`.
        step: see `sweep`.
        settle: see `sweep`.
        start: number of the block's first column.
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
