"""Layers that share their input are solved for together, one below the other."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.pruners.protocol import (
    JointPruner,
    Pruned,
    Pruner,
    as_pruned,
    check_statistic,
    check_weight,
    widened,
)
from prune_callbacks.solvers.linalg import DampedGram, damp
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.solvers.statistics import Gram, Statistic
from prune_callbacks.sparsity import NM, Block, Pattern

Solve = Callable[[Tensor, DampedGram, Choose, list[int]], tuple[Tensor, ...]]


@runtime_checkable
class Compensating(JointPruner, Protocol):
    """A joint pruner whose work is one call of a solver with a damped Gram."""

    @property
    def damping(self) -> float: ...

    def solve(
        self, weight: Float[Tensor, "out in"], system: DampedGram, keep_best: Choose, heights: list[int]
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """
        The pruned weights and their mask.

        Args:
            weight: of the layers, one below the other.
            system: their damped Gram.
            keep_best: chooses the mask of a slice of columns, every layer's by itself.
            heights: the rows of every layer.
        """
        ...


def compensated(pruner: Compensating, weights: Sequence[Tensor], statistic: Statistic | None) -> list[Pruned]:
    """What a pruner's solver makes of layers with one Gram; every layer's mask is its own."""
    return solved_together(pruner, weights, statistic, pruner.damping, pruner.solve)


def solved_together(
    pruner: Pruner, weights: Sequence[Tensor], statistic: Statistic | None, damping: float, solve: Solve
) -> list[Pruned]:
    """
    What `solve` makes of layers with one Gram, which is damped and factorised once.

    Args:
        pruner: in whose name the layers are checked, and whose pattern they get.
        weights: of the layers.
        statistic: their Gram.
        damping: a fraction of its mean diagonal.
        solve: see `Compensating.solve`; may return scales behind weights and mask.
    """
    gram = check_layers(pruner, weights, statistic)
    stacked, heights = torch.cat([widened(weight, gram) for weight in weights]), [len(weight) for weight in weights]
    system = damp(gram.matrix.to(stacked), damping)
    results = solve(stacked, system, chooser(pruner.pattern, heights), heights)
    del stacked, system  # both are large
    parts = zip(weights, *(result.split(heights) for result in results), strict=True)
    return [as_pruned(dense, solved, keep, gram, *scale) for dense, solved, keep, *scale in parts]


def check_layers(pruner: Pruner, weights: Sequence[Tensor], statistic: Statistic | None) -> Gram:
    """The layers' Gram; ValueError for layers that the pruner cannot take, or another statistic."""
    name = type(pruner).__name__
    for weight in weights:
        check_weight(weight, pruner.pattern)
        check_statistic(name, weight, statistic)
    if not isinstance(statistic, Gram):
        raise ValueError(
            f"{name} needs a Gram, got {type(statistic).__name__}; use the one that {name}.statistic() makes"
        )
    return statistic


def chooser(pattern: Pattern, heights: list[int]) -> Choose:
    """`Pattern.keep` for layers that stand one below the other, each a pool of its own."""

    def keep_best(scores: Tensor, start: int) -> Tensor:
        return torch.cat([pattern.keep(part, start=start) for part in scores.split(heights)])

    return keep_best


def check_settings(name: str, pattern: Pattern, block_size: int | None, damping: float) -> None:
    """Raises ValueError for a block or a damping that cannot be."""
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"{name}: damping is a fraction of the Gram's mean diagonal and must be >= 0, got {damping}")
    if block_size is None:
        return
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise ValueError(f"{name}: block_size is a whole number of columns (None: all of them), got {block_size!r}")
    if block_size < 1:
        raise ValueError(f"{name}: block_size is a number of columns and must be at least 1, got {block_size}")
    if block_size < _unit(pattern):
        raise ValueError(
            f"{name}: block_size must hold the {_unit(pattern)} columns that {pattern} decides together, "
            f"got {block_size}"
        )


def _unit(pattern: Pattern) -> int:
    """Columns whose mask is decided together."""
    return pattern.m if isinstance(pattern, NM) else pattern.size if isinstance(pattern, Block) else 1


def step_of(pattern: Pattern, width: int) -> int:
    """Columns whose mask SparseGPT chooses together: a group of N:M, else a whole block."""
    return pattern.m if isinstance(pattern, NM) else width


def whole_units(block_size: int, pattern: Pattern) -> int:
    """The block size rounded down to whole groups or blocks of the pattern."""
    return block_size - block_size % _unit(pattern)
