"""Common code of pruners with a Gram: solves layers that share their input together, stacked."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.protocol import Pruned, Pruner, as_pruned, check_statistic, check_weight, widened
from prune_callbacks.solvers.linalg import DampedGram, damp
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.solvers.statistics import Gram, Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import column_group, kept_of_group, removes_rows, removes_single_weights

Solve = Callable[[Tensor, DampedGram, Choose, list[int]], Solved]


class Compensating(ABC):
    """
    A pruner that calls one solver with a damped Gram and compensates: survivors change so that the output stays.

    Attributes:
        pattern: the allowed masks, with the sparsity.
        damping: added to the Gram's diagonal, as a fraction of the diagonal's mean.
    """

    pattern: Pattern
    damping: float

    @abstractmethod
    def solve(self, weight: Float[Tensor, "out in"], system: DampedGram, choose: Choose, heights: list[int]) -> Solved:
        """
        Prunes layers that share their input, stacked.

        Args:
            weight: the layers' weights, one below the other.
            system: the layers' damped Gram.
            choose: returns the mask of a slice of columns, chosen for every layer separately.
            heights: the number of rows of every layer.

        Returns:
            the new weights and the keep mask, stacked alike; one loss per layer and the scales, where known.
        """

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """Makes an empty Gram of the layer's inputs."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """Prunes one layer; see `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """Prunes layers that share their input; see `JointPruner`."""
        return solve_together(self, weights, statistic, self.damping, self.solve)


def as_compensating(pruner: Pruner | None) -> Compensating | None:
    """Returns the pruner if it is one that compensates with a damped Gram; else None."""
    return pruner if isinstance(pruner, Compensating) else None


def solve_together(
    pruner: Pruner, weights: Sequence[Tensor], statistic: Statistic | None, damping: float, solve: Solve
) -> list[Pruned]:
    """
    Prunes layers that share one Gram, which is damped and factorised once.

    Args:
        pruner: the pruner, for its pattern and for the text of errors.
        weights: the layers' weights, each (out, in).
        statistic: the Gram of the layers' inputs.
        damping: added to the Gram's diagonal, as a fraction of the diagonal's mean.
        solve: see `Compensating.solve`.

    Raises:
        ValueError: a weight does not fit the pattern or holds NaN or inf, or the statistic is no Gram of its inputs.
        NumericalError: the Gram cannot be factorised, or the new weights hold NaN or inf.
    """
    gram = check_layers(pruner, weights, statistic)
    stacked, heights = torch.cat([widened(weight, gram) for weight in weights]), [len(weight) for weight in weights]
    system = damp(gram.matrix.to(stacked), damping)
    solved = solve(stacked, system, chooser(pruner.pattern, heights), heights)
    del stacked, system  # both are large
    parts = zip(solved.weight.split(heights), solved.keep.split(heights), strict=True)
    losses = [None] * len(weights) if solved.loss is None else solved.loss.tolist()
    scales = [None] * len(weights) if solved.scale is None else solved.scale.split(heights)
    return [
        as_pruned(dense, weight, keep, gram, scale, loss)
        for dense, (weight, keep), scale, loss in zip(weights, parts, scales, losses, strict=True)
    ]


def check_layers(pruner: Pruner, weights: Sequence[Tensor], statistic: Statistic | None) -> Gram:
    """Returns the layers' Gram; raises ValueError for a layer that cannot be pruned or a statistic that is no Gram."""
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
    """Makes the function that calls `Pattern.keep` for every one of the stacked layers; no pool spans two layers."""

    def keep_best(scores: Tensor, start: int) -> Tensor:
        return torch.cat([pattern.keep(part, start=start) for part in scores.split(heights)])

    return keep_best


def check_settings(name: str, pattern: Pattern, block_size: int | None, damping: float) -> None:
    """Raises ValueError for a block size or a damping that is out of range."""
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"{name}: damping is a fraction of the Gram's mean diagonal and must be >= 0, got {damping}")
    if block_size is None:
        return
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise ValueError(f"{name}: block_size is a whole number of columns (None: all of them), got {block_size!r}")
    if block_size < 1:
        raise ValueError(f"{name}: block_size is a number of columns and must be at least 1, got {block_size}")
    if block_size < column_group(pattern):
        raise ValueError(
            f"{name}: block_size must hold the {column_group(pattern)} columns that {pattern} masks together, "
            f"got {block_size}"
        )


def check_single_weights(name: str, pattern: Pattern, remedy: str) -> None:
    """Raises ValueError for a pattern other than single weights and N:M, which a sweep over the columns needs."""
    if not removes_single_weights(pattern) and kept_of_group(pattern) is None:
        raise ValueError(
            f"{name} chooses single weights while it sweeps over the columns and cannot prune {pattern}; it takes "
            f"Unstructured and NM. {remedy} For a pattern of your own use MRP, ALPS, Wanda or Magnitude."
        )


def check_survivors(name: str, pattern: Pattern) -> None:
    """Raises ValueError for a pattern that may remove all of a row, which leaves no survivors to compensate with."""
    if removes_rows(pattern):
        raise ValueError(
            f"{name} compensates a row's removed weights with the row's own survivors and cannot prune {pattern}: "
            "nothing survives in a removed row. Use Wanda or Magnitude for Rows."
        )


def sweep_step(pattern: Pattern, width: int) -> int:
    """Returns how many columns SparseGPT masks together: a group for N:M, else a whole block of `width`."""
    return width if kept_of_group(pattern) is None else column_group(pattern)


def whole_groups(block_size: int, pattern: Pattern) -> int:
    """Returns the block size rounded down to whole groups or blocks of the pattern."""
    return block_size - block_size % column_group(pattern)
