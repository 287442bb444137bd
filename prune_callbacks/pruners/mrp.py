"""MRP: removes whole sets of weights at once and compensates exactly."""

import math
from dataclasses import dataclass

from torch import Tensor

from prune_callbacks.pruners.joint import Compensating, check_settings, check_survivors, whole_groups
from prune_callbacks.pruners.protocol import check_pattern
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.mrp import mrp_mm, mrp_ms, mrp_sm
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import kept_of_group

MOST_SUBSETS = 20_000
"""The maximum of subsets of a group that MRP's mask M tries; 8:16 has 12,870."""


@dataclass(frozen=True)
class MRP(Compensating):
    """
    Removes whole sets of weights at once and compensates exactly (Zhao et al. 2024).

    "Pruning Foundation Models for High Accuracy without Retraining". Takes every pattern except `Rows`.

    Args:
        pattern: the allowed masks, with the sparsity.
        variant: the choice of the mask, then the compensation of survivors. "SM": the mask by eq. 14 (single weights,
            interactions ignored), the survivors by eq. 13 (the exact least-squares solution). "MM", for N:M only: from
            every group the subset of least loss by eq. 12, the survivors by eq. 13. "MS", for N:M only: the mask of
            "MM", the survivors by SparseGPT's sweep.
        block_size: how many columns are masked together. After each block all unpruned weights are solved for again.
            Rounded down to whole groups of an N:M pattern. None: the whole layer at once, the paper's `S = all`;
            fastest. The pool of a pattern other than N:M is a block. "MS" chooses the mask group by group; there it is
            only the number of columns updated together.
        damping: added to the Gram's diagonal, as a fraction of the diagonal's mean; at least 0.

    Raises:
        ValueError: the pattern may remove whole rows, the variant needs N:M or fewer subsets, or a setting is out of
            range.
    """

    pattern: Pattern
    variant: str = "SM"
    block_size: int | None = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_pattern("MRP", self.pattern)
        if self.variant not in ("SM", "MS", "MM"):
            raise ValueError(f'MRP: variant must be "SM", "MS" or "MM", got {self.variant!r}; "SS" is SparseGPT')
        if self.variant != "SM":
            _check_subsets(self.pattern)
        check_survivors("MRP", self.pattern)
        check_settings("MRP", self.pattern, self.block_size, self.damping)

    def solve(self, weight: Tensor, system: DampedGram, choose: Choose, heights: list[int]) -> Solved:
        """Calls the variant's function in `prune_callbacks.solvers.mrp`; see `Compensating.solve`."""
        pattern = self.pattern
        width = None if self.block_size is None else whole_groups(self.block_size, pattern)
        if self.variant == "SM":
            return mrp_sm(weight, system, choose, width, heights)
        group = kept_of_group(pattern)
        assert group is not None
        if self.variant == "MM":
            return mrp_mm(weight, system, *group, width, heights)
        return mrp_ms(weight, system, *group, width or weight.shape[1], heights)


def _check_subsets(pattern: Pattern) -> None:
    """Raises ValueError for a pattern without groups, or with more subsets of a group than `MOST_SUBSETS`."""
    group = kept_of_group(pattern)
    if group is None:
        raise ValueError(
            "MRP: mask M tries every subset of the weights that are masked together, C(m, n) in a group of NM; "
            f'{pattern} has too many to try (the paper has mask M for N:M only). Use variant "SM".'
        )
    if (count := math.comb(group[1], group[0])) > MOST_SUBSETS:
        raise ValueError(
            f"MRP: mask M tries every subset of a group, and {pattern} has {count} of them, more than "
            f'{MOST_SUBSETS}. Use variant "SM".'
        )
