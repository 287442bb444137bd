"""Pruners: score, pattern and solver, as frozen values behind one Protocol."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.alps import alps
from prune_callbacks.solvers.linalg import DampedGram, NumericalError, all_finite, damp, row_dot
from prune_callbacks.solvers.mrp import mrp_mm, mrp_ms, mrp_sm
from prune_callbacks.solvers.sparsegpt import Choose, sparsegpt
from prune_callbacks.solvers.statistics import Gram, InputNorm, Statistic
from prune_callbacks.sparsity import NM, Block, Columns, Pattern, Unstructured

MOST_SUBSETS = 20_000
"""Of a group that MRP's mask M tries: 8:16 has 12,870."""


@dataclass(frozen=True)
class Pruned:
    """
    What a pruner returns for one layer.

    Attributes:
        weight: pruned and, where the method does so, compensated; shape, dtype and device of the dense one.
        keep: True where a weight is kept; shape (out, in).
        loss: `sum over rows of d G d^T` with `d = weight - dense` and the undamped Gram `G`, the squared error
            of the layer's output over all calibration tokens. None if the pruner had no Gram.
    """

    weight: Float[Tensor, "out in"]
    keep: Bool[Tensor, "out in"]
    loss: float | None


@runtime_checkable
class Pruner(Protocol):
    """
    Removes weights of one linear layer.

    `prune` never changes its arguments. It computes in float32, or in float64 if the weight or the statistic
    is. It raises ValueError for a shape that the pattern does not fit, a weight with NaN or inf, or a
    statistic of the wrong kind or size, and NumericalError if the Gram cannot be factorised.
    """

    @property
    def pattern(self) -> Pattern: ...

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram | InputNorm | None:
        """An empty statistic to stream the layer's inputs into; None if no calibration is needed."""

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned: ...


@runtime_checkable
class JointPruner(Pruner, Protocol):
    """A pruner that can solve for several layers with the same input at once."""

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """
        Equivalent to `prune` for each of the weights, which share one dtype and device, with the same statistic.

        One factorisation of the Gram serves them all, and their rows are solved for together; the mask of each is
        its own.
        """
        ...


@dataclass(frozen=True)
class Magnitude:
    """Removes the smallest weights, by `|W|` (Zhu & Gupta 2017). The pool is the layer. Needs no calibration."""

    pattern: Pattern

    def __post_init__(self) -> None:
        _check_pattern("Magnitude", self.pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> None:
        """None: magnitudes need no calibration."""
        return

    def scores(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`|W|`, in float32 or float64; of any part of a weight, too."""
        return _working(weight, None).abs()

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None = None) -> Pruned:
        """Equivalent to sorting `|W|` and zeroing the smallest; see `Pruner`."""
        check_weight(weight, self.pattern)
        keep = self.pattern.keep(self.scores(weight))
        return _pruned(weight, weight, keep, statistic)


@dataclass(frozen=True)
class Wanda:
    """
    Removes by `|W_ij| * ||X_j||_2`, within each output row (Sun et al. 2024). No weight is changed.

    A pattern of rows, columns or blocks sums this score over the structure.
    """

    pattern: Pattern

    def __post_init__(self) -> None:
        _check_pattern("Wanda", self.pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> InputNorm:
        """The norms of the input features."""
        return InputNorm(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """Equivalent to sorting each row's scores and zeroing the smallest; see `Pruner`."""
        check_weight(weight, self.pattern)
        known = _check_statistic("Wanda", weight, statistic)
        pattern = self.pattern
        if isinstance(pattern, Unstructured) and pattern.per is None:
            pattern = replace(pattern, per="row")
        keep = pattern.keep(_working(weight, known).abs() * known.squared_norm.to(weight.device).sqrt())
        return _pruned(weight, weight, keep, known)


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
        _check_pattern("SparseGPT", self.pattern)
        if not isinstance(self.pattern, Unstructured | NM):
            raise ValueError(
                f"SparseGPT chooses single weights while it sweeps over the columns and cannot prune {self.pattern}; "
                "it takes Unstructured and NM. Use Wanda or Magnitude for Rows, and MRP, Wanda or Magnitude for "
                "Columns and Block."
            )
        _check_settings("SparseGPT", self.pattern, self.block_size, self.damping)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram of the layer's inputs."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """See `prune_callbacks.solvers.sparsegpt.sparsegpt` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """See `JointPruner`."""
        width = _whole_units(self.block_size, self.pattern)
        step = self.pattern.m if isinstance(self.pattern, NM) else width

        def solve(stacked: Tensor, system: DampedGram, keep_best: Choose, _: list[int]) -> tuple[Tensor, Tensor]:
            return sparsegpt(stacked, system, keep_best, step, width)

        return _compensated(self, weights, statistic, solve)


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
        _check_pattern("MRP", self.pattern)
        if self.variant not in ("SM", "MS", "MM"):
            raise ValueError(
                f'MRP: variant must be "SM", "MS" or "MM", got {self.variant!r}; "SS" is what SparseGPT does'
            )
        if self.variant != "SM":
            _check_subsets(self.pattern)
        _check_survivors("MRP", self.pattern)
        _check_settings("MRP", self.pattern, self.block_size, self.damping)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram of the layer's inputs."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """See `prune_callbacks.solvers.mrp` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """See `JointPruner`."""
        pattern = self.pattern
        width = None if self.block_size is None else _whole_units(self.block_size, pattern)

        def solve(stacked: Tensor, system: DampedGram, keep_best: Choose, heights: list[int]) -> tuple[Tensor, Tensor]:
            if self.variant == "SM":
                return mrp_sm(stacked, system, keep_best, width, heights)
            assert isinstance(pattern, NM)
            if self.variant == "MM":
                return mrp_mm(stacked, system, pattern, width, heights)
            return mrp_ms(stacked, system, pattern, width or stacked.shape[1])

        return _compensated(self, weights, statistic, solve)


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
        _check_pattern("ALPS", self.pattern)
        _check_survivors("ALPS", self.pattern)
        _check_settings("ALPS", self.pattern, None, self.damping)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram of the layer's inputs."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """See `prune_callbacks.solvers.alps.alps` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """See `JointPruner`."""
        return _compensated(self, weights, statistic, alps)


Solver = Callable[[Tensor, DampedGram, Choose, list[int]], tuple[Tensor, Tensor]]


def _compensated(
    pruner: SparseGPT | MRP | ALPS, weights: Sequence[Tensor], statistic: Statistic | None, solve: Solver
) -> list[Pruned]:
    name, pattern = type(pruner).__name__, pruner.pattern
    for weight in weights:
        check_weight(weight, pattern)
        _check_statistic(name, weight, statistic)
    if not isinstance(statistic, Gram):
        raise ValueError(
            f"{name} needs a Gram, got {type(statistic).__name__}; use the one that {name}.statistic() makes"
        )
    working = torch.cat([_working(weight, statistic) for weight in weights])
    heights = [len(weight) for weight in weights]

    def keep_best(scores: Tensor, start: int) -> Tensor:
        return torch.cat([pattern.keep(part, start=start) for part in scores.split(heights)])

    solved, keep = solve(working, damp(statistic.matrix.to(working), pruner.damping), keep_best, heights)
    parts = zip(weights, solved.split(heights), keep.split(heights), strict=True)
    return [_pruned(dense, part, kept, statistic) for dense, part, kept in parts]


def _pruned(dense: Tensor, solved: Tensor, keep: Tensor, statistic: Statistic | None) -> Pruned:
    weight = solved.to(dense.dtype) * keep.to(dense.dtype) + 0  # the last turns -0 into 0
    if not all_finite(weight):
        raise NumericalError(
            f"the pruned weights hold NaN or inf in {weight.dtype}. Use a larger damping, more calibration tokens, or "
            "a dtype with a wider range"
        )
    loss = None
    if isinstance(statistic, Gram):
        change = (weight.to(statistic.matrix.dtype) - dense.to(statistic.matrix.dtype)).to(statistic.matrix.device)
        # Not below zero, which rounding can do where the loss is zero.
        loss = max(0.0, row_dot(change @ statistic.matrix, change))
    return Pruned(weight, keep, loss)


def _working(weight: Tensor, statistic: Statistic | None) -> Tensor:
    known = torch.float32 if statistic is None else statistic.squared_norm.dtype
    dtype = torch.promote_types(torch.promote_types(weight.dtype, torch.float32), known)
    return weight.detach().to(dtype)


def check_weight(weight: Tensor, pattern: Pattern) -> None:
    """Raises ValueError for a weight that no pruner takes: of a shape that does not fit, or with NaN or inf."""
    if weight.ndim != 2:
        raise ValueError(f"a weight must have two dimensions, (out, in), got shape {tuple(weight.shape)}")
    pattern.check_shape((weight.shape[0], weight.shape[1]))
    if not all_finite(weight):
        raise ValueError("the dense weight holds NaN or inf")


def _check_statistic(name: str, weight: Tensor, statistic: Statistic | None) -> Statistic:
    if statistic is None:
        raise ValueError(f"{name} needs calibration statistics, got None; fill the one that {name}.statistic() makes")
    if len(statistic.squared_norm) != weight.shape[1]:
        raise ValueError(
            f"statistics of {len(statistic.squared_norm)} input features for a weight of shape {tuple(weight.shape)}"
        )
    if statistic.tokens == 0:
        raise ValueError("the calibration statistics are empty: no token was added")
    if not all_finite(statistic.squared_norm):
        raise ValueError("the calibration activations hold NaN or inf: the inputs of this layer are not finite numbers")
    return statistic


def _check_pattern(name: str, pattern: Pattern) -> None:
    if not isinstance(pattern, Pattern):
        raise ValueError(f"{name} takes a pattern such as Unstructured(0.5) or NM(2, 4), got {pattern!r}")


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


def _check_settings(name: str, pattern: Pattern, block_size: int | None, damping: float) -> None:
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


def _whole_units(block_size: int, pattern: Pattern) -> int:
    return block_size - block_size % _unit(pattern)
