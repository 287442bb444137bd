"""
MRP, the multiple removal problem (Zhao et al. 2024): removes whole sets of weights and compensates exactly.

The first letter of a variant says how the mask is chosen, the second how the survivors are compensated. S treats
removed weights one at a time, M all at once. SS is SparseGPT.
"""

import itertools
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.least_squares import MaskedLeastSquares
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.precision import full_precision
from prune_callbacks.solvers.solved import Solved, sum_by_layer
from prune_callbacks.solvers.sparsegpt import Choose, sweep

CHUNK = 2**24
"""How many weights `mask_m` scores at once; it needs a few numbers of memory for each."""

AT_ONCE = 2**27
"""
How many weights are solved for at once: half a gigabyte for each array of the solver in float32.

Rows are independent under a mask, and more rows at once would be no faster. A 70B model's gate_proj has twice as many
weights.
"""


@full_precision()
def mrp_sm(
    weight: Float[Tensor, "out in"],
    system: DampedGram,
    keep_best: Choose,
    block_size: int | None,
    heights: Sequence[int] | None = None,
) -> Solved:
    """
    Prunes and compensates one layer: mask S, compensation M.

    Equivalent to going through the blocks of columns and choosing, in each, the mask of the largest
    `W_ij^2 / [H^-1]_jj` (eq. 14). After each block, eq. 13 is solved with the mask of all blocks so far, which changes
    **all** unpruned weights, those of earlier and later blocks included.

    Args:
        weight: dense weights, (out, in), float32 or float64.
        system: the layer's damped Gram.
        keep_best: `Pattern.keep` of a pattern that never removes a whole row, which could not be compensated.
        block_size: columns per block; None is the paper's `S = all`.
        heights: the numbers of rows of the layers that are stacked in `weight`; None: a single layer.
    """

    def choose(current: Tensor, start: int) -> Tensor:
        return keep_best(eq_14(current, system, start), start)

    return _in_blocks(weight, system, choose, block_size, heights)


@full_precision()
def mrp_mm(
    weight: Float[Tensor, "out in"],
    system: DampedGram,
    n: int,
    m: int,
    block_size: int | None,
    heights: Sequence[int] | None = None,
) -> Solved:
    """
    Prunes and compensates one layer to N:M: mask M, compensation M.

    Equivalent to `mrp_sm` with the mask of least `w_P [(H^-1)_PP]^-1 w_P^T` (eq. 12) in every group of m, where P is
    the set of columns removed from the group. `n` of every `m` columns are kept. For the other arguments see `mrp_sm`.
    """
    inverse = system.inverse_blocks(m)

    def choose(current: Tensor, start: int) -> Tensor:
        a = start // m
        return mask_m(current, inverse[a : a + current.shape[1] // m], n)

    return _in_blocks(weight, system, choose, block_size, heights)


@full_precision()
def mrp_ms(
    weight: Float[Tensor, "out in"],
    system: DampedGram,
    n: int,
    m: int,
    block_size: int,
    heights: Sequence[int] | None = None,
) -> Solved:
    """
    Prunes and compensates one layer to N:M: mask M, compensation S.

    Equivalent to SparseGPT with the mask of least eq. 12 in every group, chosen when the sweep reaches the group. Its
    inverse is that of H over the columns not yet swept: `U_gg^T U_gg`, with `U_gg` the group's diagonal block of
    SparseGPT's factor. `n` of every `m` columns are kept. For the other arguments see `sparsegpt`.
    """

    def choose(current: Tensor, start: int) -> Tensor:
        factor = system.inverse_factor[start : start + m, start : start + m]
        return mask_m(current, (factor.T @ factor)[None], n)

    return sweep(weight, system, choose, m, block_size, heights=heights)


def eq_14(current: Float[Tensor, "out columns"], system: DampedGram, start: int = 0) -> Float[Tensor, "out columns"]:
    """Computes the scores of mask S, `W_ij^2 / [H^-1]_jj`, for a slice of columns that begins at column `start`."""
    return current.square() / system.inverse_diagonal[start : start + current.shape[1]]


def mask_m(
    weight: Float[Tensor, "out columns"], inverse: Float[Tensor, "groups m m"], n: int
) -> Bool[Tensor, "out columns"]:
    """
    Returns the mask that keeps n of every group of m at the least removal loss `w_P [(H^-1)_PP]^-1 w_P^T`.

    Equivalent to trying all `C(m, n)` subsets of every group of every row (eq. 12 without its factor 1/2). Among
    subsets of equal loss the one that keeps the lowest columns wins.

    Args:
        weight: (out, groups * m).
        inverse: the diagonal block of `H^-1` for each group.
        n: how many columns of a group are kept.
    """
    m = inverse.shape[-1]
    removed, kept_table = (table.to(weight.device) for table in _subsets(n, m))
    keep = torch.empty_like(weight, dtype=torch.bool)
    for rows, kept in zip(weight.split(step := max(1, CHUNK // weight.shape[1])), keep.split(step), strict=True):
        by_group = rows.T.unflatten(0, (-1, m)).contiguous()  # (groups, m, rows)
        least = by_group.new_full((by_group.shape[0], by_group.shape[2]), torch.inf)
        best = torch.zeros_like(least, dtype=torch.long)
        for index, gone in enumerate(removed):
            # w_P A^-1 w_P^T is the squared norm of L^-1 w_P, A = L L^T.
            factor = torch.linalg.cholesky(inverse[:, gone[:, None], gone])
            loss = torch.linalg.solve_triangular(factor, by_group[:, gone], upper=False).square_().sum(1)
            better = loss < least
            least = torch.where(better, loss, least)
            best.masked_fill_(better, index)
        kept.copy_(kept_table[best].transpose(0, 1).flatten(1))
    return keep


@cache
def _subsets(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Returns the columns that each subset of n of m removes, (subsets, m - n), and its mask, (subsets, m)."""
    removed = torch.tensor([[j for j in range(m) if j not in kept] for kept in itertools.combinations(range(m), n)])
    return removed, torch.ones(len(removed), m, dtype=torch.bool).scatter_(1, removed, False)


def _in_blocks(
    weight: Tensor, system: DampedGram, choose: Choose, block_size: int | None, heights: Sequence[int] | None
) -> Solved:
    """Alternates between choosing the mask of a block of columns and compensating all weights exactly."""
    dense = weight * (~system.dead).to(weight)
    columns = weight.shape[1]
    step = columns if block_size is None else block_size
    sizes = _parts([len(weight)] if heights is None else heights, max(1, AT_ONCE // columns))
    rows = dense.split([sum(part) for part in sizes])
    solutions = [MaskedLeastSquares(part, system, size) for part, size in zip(rows, sizes, strict=True)]
    keep = torch.ones_like(weight, dtype=torch.bool)
    masks = keep.split([len(part) for part in rows])
    for a in range(0, columns, step):
        b = min(a + step, columns)
        keep[:, a:b] = choose(torch.cat([solution.weight[:, a:b] for solution in solutions]), a)
        # The solution between two blocks only serves to choose the next block's mask, so it is not certified.
        for solution, kept in zip(solutions if b < columns else (), masks, strict=False):
            solution.restrict(kept)
            solution.approach(2.5 * solution.tolerance)
    solved, losses = [], []
    for kept in masks:  # each solution is freed before the next one is computed
        solution = solutions.pop(0)
        solution.restrict(kept)
        solution.solve()
        solved.append(solution.weight)
        losses.append(solution.undamped_of_rows())
        del solution
    return Solved(torch.cat(solved), keep, sum_by_layer(torch.cat(losses), heights))


def _parts(heights: Sequence[int], most: int) -> list[list[int]]:
    """Divides layers of so many rows into parts of at most `most` rows; returns the rows of each part's layers."""
    parts: list[list[int]] = []
    for height in heights:
        for rows in [most] * (height // most) + [height % most] * (height % most > 0):
            if parts and sum(parts[-1]) + rows <= most:
                parts[-1].append(rows)
            else:
                parts.append([rows])
    return parts
