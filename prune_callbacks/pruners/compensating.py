"""SparseGPT, MRP and ALPS: what stays makes up for what goes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.joint import check_settings, compensated, step_of, whole_units
from prune_callbacks.pruners.protocol import Pruned, check_pattern
from prune_callbacks.solvers.alps import alps
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.mrp import mrp_mm, mrp_ms, mrp_sm
from prune_callbacks.solvers.sparsegpt import Choose, sparsegpt
from prune_callbacks.solvers.statistics import Gram, Statistic
from prune_callbacks.sparsity import NM, Block, Columns, Pattern, Unstructured

MOST_SUBSETS = 20_000
"""Of a group that MRP's mask M tries: 8:16 has 12,870."""


@dataclass(frozen=True)
class SparseGPT:
    """
    One sweep of Optimal Brain Surgeon over the columns (Frantar & Alistarh 2023).

    Takes `Unstructured` (the pool is a block of columns over all rows) and `NM`.

    Args:
        pattern: what to remove.
        block_size: columns whose mask is chosen together, and whose updates are applied together; rounded down to
            whole groups of an N:M pattern.
        damping: added to the Gram's diagonal, as a fraction of its mean.
    """

    pattern: Pattern
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_pattern("SparseGPT", self.pattern)
        if not isinstance(self.pattern, Unstructured | NM):
            raise ValueError(
                f"SparseGPT chooses single weights while it sweeps over the columns and cannot prune {self.pattern}; "
                "it takes Unstructured and NM. Use Wanda or Magnitude for Rows, and MRP, Wanda or Magnitude for "
                "Columns and Block."
            )
        check_settings("SparseGPT", self.pattern, self.block_size, self.damping)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram of the layer's inputs."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """See `prune_callbacks.solvers.sparsegpt.sparsegpt` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """See `JointPruner`."""
        return compensated(self, weights, statistic)

    def solve(self, weight: Tensor, system: DampedGram, keep_best: Choose, heights: list[int]) -> tuple[Tensor, Tensor]:
        """See `prune_callbacks.solvers.sparsegpt.sparsegpt` and `Compensating`."""
        width = whole_units(self.block_size, self.pattern)
        return sparsegpt(weight, system, keep_best, step_of(self.pattern, width), width)


@dataclass(frozen=True)
class MRP:
    """
    Removes whole sets of weights at once and compensates exactly (Zhao et al. 2024).

    "Pruning Foundation Models for High Accuracy without Retraining". Takes every pattern but `Rows`.

    Args:
        pattern: what to remove.
        variant: how the mask is chosen, and how the survivors are compensated. "SM": the mask by eq. 14 (single
            weights, interactions ignored), the survivors by eq. 13 (the exact least-squares solution). "MM", for N:M
            only: of every group the subset of least loss by eq. 12, and eq. 13. "MS", for N:M only: that subset, and
            SparseGPT's sweep.
        block_size: columns masked together; after each block all unpruned weights are solved for again. Rounded
            down to whole groups of an N:M pattern. None: the whole layer at once, the paper's `S = all`; fastest. The
            pool of a pattern other than N:M is a block. In "MS", whose sweep decides group after group, it only says
            how many columns are updated together.
        damping: added to the Gram's diagonal, as a fraction of its mean.
    """

    pattern: Pattern
    variant: str = "SM"
    block_size: int | None = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_pattern("MRP", self.pattern)
        if self.variant not in ("SM", "MS", "MM"):
            raise ValueError(
                f'MRP: variant must be "SM", "MS" or "MM", got {self.variant!r}; "SS" is what SparseGPT does'
            )
        if self.variant != "SM":
            _check_subsets(self.pattern)
        _check_survivors("MRP", self.pattern)
        check_settings("MRP", self.pattern, self.block_size, self.damping)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram of the layer's inputs."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """See `prune_callbacks.solvers.mrp` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """See `JointPruner`."""
        return compensated(self, weights, statistic)

    def solve(self, weight: Tensor, system: DampedGram, keep_best: Choose, heights: list[int]) -> tuple[Tensor, Tensor]:
        """See `prune_callbacks.solvers.mrp` and `Compensating`."""
        pattern = self.pattern
        width = None if self.block_size is None else whole_units(self.block_size, pattern)
        if self.variant == "SM":
            return mrp_sm(weight, system, keep_best, width, heights)
        assert isinstance(pattern, NM)
        if self.variant == "MM":
            return mrp_mm(weight, system, pattern, width, heights)
        return mrp_ms(weight, system, pattern, width or weight.shape[1])


@dataclass(frozen=True)
class ALPS:
    """
    Seeks mask and weights together, then the exact weights for the mask (Meng et al. 2024).

    "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models". Takes every pattern
    but `Rows`. The loss is never above that of `MRP(pattern, block_size=None)` on the same layer, up to its tolerance.

    Args:
        pattern: what to remove; an `Unstructured` pool is the layer, or the row with `per="row"`.
        damping: added to the Gram's diagonal, as a fraction of its mean.
    """

    pattern: Pattern
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_pattern("ALPS", self.pattern)
        _check_survivors("ALPS", self.pattern)
        check_settings("ALPS", self.pattern, None, self.damping)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram of the layer's inputs."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """See `prune_callbacks.solvers.alps.alps` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """See `JointPruner`."""
        return compensated(self, weights, statistic)

    def solve(self, weight: Tensor, system: DampedGram, keep_best: Choose, heights: list[int]) -> tuple[Tensor, Tensor]:
        """See `prune_callbacks.solvers.alps.alps` and `Compensating`."""
        return alps(weight, system, keep_best, heights)


def _check_survivors(name: str, pattern: Pattern) -> None:
    if not isinstance(pattern, Unstructured | NM | Block | Columns):
        raise ValueError(
            f"{name} compensates a row's removed weights with the row's own survivors and cannot prune "
            f"{pattern}: nothing survives in a removed row. Use Wanda or Magnitude for Rows."
        )


def _check_subsets(pattern: Pattern) -> None:
    if not isinstance(pattern, NM):
        raise ValueError(
            "MRP: mask M tries every subset of the weights that it decides together, C(m, n) in a group of NM; "
            f'{pattern} has too many to try (the paper has mask M for N:M only). Use variant "SM".'
        )
    if (count := math.comb(pattern.m, pattern.n)) > MOST_SUBSETS:
        raise ValueError(
            f"MRP: mask M tries every subset of a group, and {pattern} has {count} of them, more than "
            f'{MOST_SUBSETS}. Use variant "SM".'
        )
