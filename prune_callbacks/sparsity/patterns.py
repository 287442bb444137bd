"""
Sparsity patterns: which masks are allowed, as frozen values.

A pattern owns its sparsity, the fraction of weights removed. Weights, scores and masks are
`(out, in)`: rows are output neurons, columns are input features.
"""

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.sparsity.selection import count_true, keep_largest, refuse_nan


@runtime_checkable
class Pattern(Protocol):
    """
    What every pattern offers.

    `keep(scores, start)` returns the mask with the largest total score that the pattern allows: an exact
    count, ties broken toward the lowest index (the first of equal scores is kept), ValueError on NaN.
    `start` is for solvers that choose masks a slice of columns at a time: it is the slice's first column in
    the whole layer, and the counts of consecutive slices add up to the count of the whole layer.

    A pattern may answer further questions, by attributes that have a default; see `prune_callbacks.sparsity.questions`.
    """

    @property
    def sparsity(self) -> float: ...

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]: ...

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raises ValueError if a layer of `shape` (out, in) cannot have this pattern."""

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Whether a mask has this pattern: at least as sparse, and of the right structure."""


def check_sparsity(pattern: str, sparsity: float) -> None:
    """Raises ValueError, in the name of a pattern, for a sparsity outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"{pattern}: sparsity is the fraction of weights removed and must lie in [0, 1), "
            f"got {sparsity}. For 50 % write 0.5."
        )


def removed_units(sparsity: float, total: int, before: int = 0) -> int:
    """How many of the units `before`..`total` go, so that consecutive ranges add up exactly."""
    return round(sparsity * total) - round(sparsity * before)


@dataclass(frozen=True)
class Unstructured:
    """
    Any weight may go: `round(sparsity * count)` weights are removed.

    Args:
        sparsity: fraction removed, in [0, 1).
        per: "row": every output row loses the same count (Wanda's convention). "even": the same count up to one, so
            that the layer's total is exact to one weight; where rows differ, those lose one more whose next weight
            scores least. "tensor": the whole layer is one pool (SparseGPT and MRP: the pool is one block of columns
            at a time). None: what the pruner's paper does, which is "row" for Wanda and "tensor" for the others.
    """

    sparsity: float
    per: Literal["row", "even", "tensor"] | None = None

    unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_sparsity("Unstructured", self.sparsity)
        if self.per not in ("row", "even", "tensor", None):
            raise ValueError(f'Unstructured: per must be "row", "tensor" or None, or "even", got {self.per!r}')

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]:
        """The mask of the largest scores; see `Pattern`."""
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
        """The pattern with `per` set as a pruner of this pool means it; itself if `per` is given."""
        return replace(self, per="row") if self.per is None and pool == "row" else self

    def with_exact_total(self, pool: Literal["row", "layer"]) -> "Unstructured":
        """The pattern whose total over a layer is exact to one weight: equal counts in all rows would miss it."""
        return replace(self, per="even") if self.in_pool(pool).per == "row" else self

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Every shape will do."""

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Whether enough weights are gone, by the count that `per` names; None: by either count."""
        columns, in_rows = keep.shape[1], count_true(keep)
        by_row = bool((in_rows <= columns - removed_units(self.sparsity, columns)).all())
        by_tensor = int(in_rows.sum()) <= keep.numel() - removed_units(self.sparsity, keep.numel())
        evenly = by_tensor and int(in_rows.max() - in_rows.min()) <= 1
        return {"row": by_row, "even": evenly, "tensor": by_tensor, None: by_row or by_tensor}[self.per]


def _keep_evenly(scores: Tensor, removed: int) -> Tensor:
    """The largest scores of every row, as many in each up to one."""
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
    N:M semi-structured: `n` **kept** of every `m` consecutive weights along the input dimension.

    `NM(2, 4).sparsity == 0.5` and `NM(1, 4).sparsity == 0.75`. (The reference code of Wanda and SparseGPT
    counts the zeros instead.)
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
        """Fraction removed, `1 - n / m`."""
        return 1 - self.n / self.m

    @property
    def column_group(self) -> int:
        """`m`."""
        return self.m

    @property
    def kept_of_group(self) -> tuple[int, int]:
        """`(n, m)`."""
        return self.n, self.m

    def at(self, sparsity: float) -> "NM":
        """Raises ValueError: there is no other sparsity."""
        raise ValueError(f"{self} has one sparsity and cannot have {sparsity}")

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]:
        """The mask of the n largest scores of every group of m; see `Pattern`."""
        refuse_nan(scores)
        self.check_shape((scores.shape[0], scores.shape[1]))
        # Every score against every other of its group: a fifth of the time of sorting groups this small.
        places = scores.unflatten(-1, (-1, self.m)).movedim(-1, 0).contiguous()
        ranks = torch.zeros_like(places, dtype=torch.uint8 if self.m < 256 else torch.int32)
        for i, j in itertools.combinations(range(self.m), 2):
            first = places[i] >= places[j]
            ranks[j] += first
            ranks[i] += ~first
        return (ranks < self.n).movedim(0, -1).flatten(-2)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raises ValueError unless m divides the input size."""
        if shape[1] % self.m:
            raise ValueError(
                f"NM({self.n}, {self.m}) needs an input size divisible by {self.m}, got {shape[1]} "
                f"(weight of shape {tuple(shape)}). Choose another m, or leave this layer out of `targets`."
            )

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Whether no group of m keeps more than n."""
        if keep.shape[1] % self.m:
            return False
        return bool((keep.unflatten(-1, (-1, self.m)).sum(-1) <= self.n).all())
