"""SparseGPT (Frantar & Alistarh 2023): one sweep over the columns, pruning and compensating as it goes."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.linalg import DampedGram

Choose = Callable[[Float[Tensor, "out columns"], int], Bool[Tensor, "out columns"]]
"""The mask of a slice of columns, from its scores or current weights and the number of its first column."""


def sparsegpt(
    weight: Float[Tensor, "out in"], system: DampedGram, keep_best: Choose, step: int, block_size: int
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
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

    Returns:
        The new weights, shape (out, in), and the mask; the arguments are left as they are.
    """
    diagonal = system.inverse_factor.diagonal()

    def choose(current: Tensor, start: int) -> Tensor:
        return keep_best((current / diagonal[start : start + current.shape[1]]).square(), start)

    return sweep(weight, system, choose, step, block_size)


def sweep(
    weight: Float[Tensor, "out in"], system: DampedGram, choose: Choose, step: int, block_size: int
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """
    Removes, column after column, what `choose` says of every `step` columns when the sweep reaches them.

    Equivalent to the loop over columns that updates all columns on the right at once. Here the columns right of a
    block of `block_size` are updated together, as one matrix product.
    """
    factor = system.inverse_factor
    diagonal = factor.diagonal()
    # Transposed, so that a column of the weight is contiguous in memory.
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    columns[system.dead] = 0
    keep = torch.zeros_like(columns, dtype=torch.bool)
    for a in range(0, len(columns), block_size):
        b = min(a + block_size, len(columns))
        block, errors = columns[a:b], torch.empty_like(columns[a:b])
        for j in range(b - a):
            if j % step == 0:
                e = min(j + step, b - a)
                keep[a + j : a + e] = choose(block[j:e].T, a + j).T
            error = block[j].masked_fill(keep[a + j], 0).div_(diagonal[a + j])
            block[j + 1 :].addr_(factor[a + j, a + j + 1 : b], error, alpha=-1)
            block[j].masked_fill_(~keep[a + j], 0)
            errors[j] = error
        columns[b:].addmm_(factor[a:b, b:].T, errors, alpha=-1)
    return columns.T.contiguous(), keep.T.contiguous()
