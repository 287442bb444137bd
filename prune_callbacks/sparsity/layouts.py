"""Reads the matrices in a mask: of a linear layer, of several experts, of a convolution."""

from torch import Tensor

from prune_callbacks.sparsity.patterns import Pattern
from prune_callbacks.sparsity.questions import kept_of_group


def matrices(keep: Tensor, pattern: Pattern, input_first: bool, groups: int) -> Tensor:
    """
    Returns a mask as (out, in), or as (matrices, out, in) of several experts or groups.

    Args:
        keep: the mask, in the shape of its parameter.
        pattern: the pattern; N:M goes along the input channels of a convolution.
        input_first: whether the mask is stored as (in, out).
        groups: the number of groups of a convolution, (out, in / groups, ...); 0 for another layer.
    """
    if groups and keep.ndim > 2:
        by_channel = kept_of_group(pattern) is not None
        rows = (keep.movedim(1, -1) if by_channel else keep).flatten(1)
        return rows.unflatten(0, (groups, -1)) if groups > 1 else rows
    return keep.mT if input_first and keep.ndim > 1 else keep


def has_pattern(keep: Tensor, pattern: Pattern) -> bool:
    """Returns whether a mask has a pattern; of several matrices each may also be kept whole, but not all of them."""
    if keep.ndim == 3:
        return not keep.all() and all(bool(matrix.all()) or pattern.holds(matrix) for matrix in keep)
    return keep.ndim == 2 and pattern.holds(keep)
