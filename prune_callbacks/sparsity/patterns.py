"""
Sparsity patterns: frozen values that say which masks are allowed.

A pattern includes its sparsity, the fraction of weights removed. Weights, scores and masks have shape `(out, in)`:
rows are output neurons, columns are input features.
"""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.interfaces import compared_by_name
from prune_callbacks.sparsity.selection import count_true, keep_largest, refuse_nan


@compared_by_name
@runtime_checkable
class Pattern(Protocol):
    """
    The interface of a pattern.

    `keep(scores, start)` returns the mask, True = kept, with the largest total score that the pattern allows. Its count
    is exact, of equal scores the first is kept, and scores of NaN raise ValueError. `start` serves solvers that choose
    masks a slice of columns at a time. It is the index of the slice's first column in the layer, and the counts of
    consecutive slices add up to the count of the whole layer.

    A pattern may also have the optional attributes that `prune_callbacks.sparsity.questions` reads.
    """

    @property
    def sparsity(self) -> float: ...

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]: ...

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raises ValueError for a `shape`, (out, in), that cannot have this pattern."""

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Returns whether a mask has this pattern: at least its sparsity, and its structure."""


def check_sparsity(pattern: str, sparsity: float) -> None:
    """Raises ValueError, naming the pattern, for a sparsity outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"{pattern}: sparsity is the fraction of weights removed and must lie in [0, 1), "
            f"got {sparsity}. For 50 % write 0.5."
        )


def removed_units(sparsity: float, total: int, before: int = 0) -> int:
    """
    Returns how many units of a slice to remove, so that the counts of consecutive slices add up exactly.

    `before` and `total` count units from the layer's start: those in front of the slice, and those up to its end.

    >>> removed_units(0.5, 3), removed_units(0.5, 6, before=3), removed_units(0.5, 6)
    (2, 1, 3)
    """
    return round(sparsity * total) - round(sparsity * before)


@dataclass(frozen=True)
class Unstructured:
    """
    Unstructured sparsity: any weight may be removed, `round(sparsity * count)` in all.

    Args:
        sparsity: fraction of weights removed, in [0, 1).
        per: the pool of weights that are compared. "row": every output row loses the same count (Wanda's convention).
            "even": every row loses the same count up to one, so that the layer's total is exact to one weight; the rows
            that lose one more are those whose next weight scores least. "tensor": the whole layer is one pool (for
            SparseGPT and MRP: one block of columns at a time). None: the convention of the pruner's paper, "row" for
            Wanda and "tensor" for the others.

    Raises:
        ValueError: `sparsity` lies outside [0, 1), or `per` is none of these.
    """

    sparsity: float
    per: Literal["row", "even", "tensor"] | None = None

    unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_sparsity("Unstructured", self.sparsity)
        if self.per not in ("row", "even", "tensor", None):
            raise ValueError(f'Unstructured: per must be "row", "even", "tensor" or None, got {self.per!r}')

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]:
        """Returns the mask of the largest scores; see `Pattern`."""
        refuse_nan(scores)
        rows, columns = scores.shape
        end = start + columns
        if self.per == "row":
            return keep_largest(scores, columns - removed_units(self.sparsity, end, start))
        removed = removed_units(self.sparsity, rows * end, rows * start)
        if self.per == "even":
            return _keep_evenly(scores, removed)
        return keep_largest(scores.flatten(), scores.numel() - removed).view(scores.shape)

    def in_pool(self, pool: Literal["row", "layer"]) -> "Unstructured":
        """Returns the pattern with `per="row"` if `per` is None and the pool is a row; else the pattern itself."""
        return replace(self, per="row") if self.per is None and pool == "row" else self

    def with_exact_total(self, pool: Literal["row", "layer"]) -> "Unstructured":
        """Returns the pattern with "row" (in this pool) replaced by "even": a layer's total is exact to one weight."""
        return replace(self, per="even") if self.in_pool(pool).per == "row" else self

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Accepts every shape."""

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Returns whether enough weights are removed from the pool that `per` names; None: from either pool."""
        columns, in_rows = keep.shape[1], count_true(keep)
        by_row = bool((in_rows <= columns - removed_units(self.sparsity, columns)).all())
        by_tensor = int(in_rows.sum()) <= keep.numel() - removed_units(self.sparsity, keep.numel())
        evenly = by_tensor and int(in_rows.max() - in_rows.min()) <= 1
        return {"row": by_row, "even": evenly, "tensor": by_tensor, None: by_row or by_tensor}[self.per]


def _keep_evenly(scores: Tensor, removed: int) -> Tensor:
    """Returns the mask of the largest scores of every row, with counts that differ by at most one."""
    rows, columns = scores.shape
    each, further = divmod(removed, rows)
    keep = keep_largest(scores, columns - each)
    if further:
        fewer = keep_largest(scores, columns - each - 1)
        next_to_go = scores[keep & ~fewer]  # one of every row
        loses = ~keep_largest(next_to_go, rows - further)
        keep[loses] = fewer[loses]
    return keep


@dataclass(frozen=True)
class NM:
    """
    N:M semi-structured sparsity: `n` of every `m` consecutive weights along the input dimension are **kept**.

    `NM(2, 4).sparsity == 0.5` and `NM(1, 4).sparsity == 0.75`. (The reference code of Wanda and SparseGPT
    counts the zeros instead.)

    Args:
        n: weights kept in a group.
        m: weights in a group.

    Raises:
        ValueError: not 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"NM(n, m) keeps n of every m weights and needs 0 < n < m, got NM({self.n}, {self.m}). "
                "NM(2, 4) keeps 2 of 4, NM(1, 4) keeps 1 of 4."
            )

    @property
    def sparsity(self) -> float:
        """Returns the fraction of weights removed, `1 - n / m`."""
        return 1 - self.n / self.m

    @property
    def column_group(self) -> int:
        """Returns `m`."""
        return self.m

    @property
    def kept_of_group(self) -> tuple[int, int]:
        """Returns `(n, m)`."""
        return self.n, self.m

    def keeping(self, n: int) -> "NM":
        """Returns the pattern that keeps `n` of every m."""
        return replace(self, n=n)

    def at(self, sparsity: float) -> "NM":
        """Raises ValueError, because the pattern determines its sparsity."""
        raise ValueError(f"{self} has one sparsity and cannot have {sparsity}")

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]:
        """Returns the mask of the n largest scores of every group of m; see `Pattern`."""
        refuse_nan(scores)
        self.check_shape((scores.shape[0], scores.shape[1]))
        # Comparing every pair in a group takes a fifth of the time of sorting groups this small.
        places = scores.unflatten(-1, (-1, self.m)).movedim(-1, 0).contiguous()
        ranks = torch.zeros_like(places, dtype=torch.uint8 if self.m < 256 else torch.int32)
        for i, j in itertools.combinations(range(self.m), 2):
            first = places[i] >= places[j]
            ranks[j] += first
            ranks[i] += ~first
        return (ranks < self.n).movedim(0, -1).flatten(-2)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raises ValueError for an input size that m does not divide."""
        if shape[1] % self.m:
            raise ValueError(
                f"NM({self.n}, {self.m}) needs an input size divisible by {self.m}, got {shape[1]} "
                f"(weight of shape {tuple(shape)}). Choose another m, or leave this layer out of `targets`."
            )

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Returns whether no group of m keeps more than n weights."""
        if keep.shape[1] % self.m:
            return False
        return bool((keep.unflatten(-1, (-1, self.m)).sum(-1) <= self.n).all())
