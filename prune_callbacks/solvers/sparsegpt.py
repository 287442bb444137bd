"""SparseGPT (Frantar & Alistarh 2023): one sweep over the columns, pruning and compensating as it goes."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.sparsity import NM, Unstructured


def sparsegpt(
    weight: Float[Tensor, "out in"], system: DampedGram, pattern: Unstructured | NM, block_size: int
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """
    Prunes and compensates one layer.

    Equivalent to Optimal Brain Surgeon applied to one column after another, left to right, with the error of
    a column pushed onto the columns on its right only (Algorithm 1 of the paper). The mask of a block of
    `block_size` columns (of a group of m for N:M) is chosen when the sweep reaches it, by the score
    `W_ij^2 / U_jj^2`.

    Returns:
        The new weights, shape (out, in), and the mask; the arguments are left as they are.
    """
    factor = system.inverse_factor
    diagonal = factor.diagonal()
    # Transposed, so that a column of the weight is contiguous in memory.
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    columns[system.dead] = 0
    keep = torch.zeros_like(columns, dtype=torch.bool)
    step = pattern.m if isinstance(pattern, NM) else block_size
    for a in range(0, len(columns), block_size):
        b = min(a + block_size, len(columns))
        block, errors = columns[a:b], torch.empty_like(columns[a:b])
        for j in range(b - a):
            if j % step == 0:
                e = min(j + step, b - a)
                scores = (block[j:e] / diagonal[a + j : a + e, None]).square()
                keep[a + j : a + e] = pattern.keep(scores.T, start=a + j).T
            error = block[j].masked_fill(keep[a + j], 0).div_(diagonal[a + j])
            block[j + 1 :].addr_(factor[a + j, a + j + 1 : b], error, alpha=-1)
            block[j].masked_fill_(~keep[a + j], 0)
            errors[j] = error
        columns[b:].addmm_(factor[a:b, b:].T, errors, alpha=-1)
    return columns.T.contiguous(), keep.T.contiguous()
