"""Structured patterns, ranked by summed scores: square blocks, whole rows, whole columns."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.sparsity.patterns import check_sparsity, removed_units
from prune_callbacks.sparsity.selection import keep_largest, refuse_nan


@dataclass(frozen=True)
class Block:
    """
    Square blocks of `size` x `size` weights: removes the `round(sparsity * blocks)` blocks of least summed score.

    Raises:
        ValueError: `sparsity` lies outside [0, 1), or `size` is below 1.
    """

    size: int
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity("Block", self.sparsity)
        if self.size < 1:
            raise ValueError(f"Block: size is the side of a square block and must be at least 1, got {self.size}")

    @property
    def column_group(self) -> int:
        """Returns `size`."""
        return self.size

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]:
        """Returns the mask of the blocks with the largest summed scores; see `Pattern`."""
        refuse_nan(scores)
        self.check_shape((scores.shape[0], scores.shape[1]))
        totals = self._tiles(scores).sum((1, 3))
        rows, columns = totals.shape
        before = start // self.size
        removed = removed_units(self.sparsity, rows * (before + columns), rows * before)
        kept = keep_largest(totals.flatten(), totals.numel() - removed).view(totals.shape)
        return kept.repeat_interleave(self.size, 0).repeat_interleave(self.size, 1)

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raises ValueError for a shape with a dimension that `size` does not divide."""
        if shape[0] % self.size or shape[1] % self.size:
            raise ValueError(
                f"Block({self.size}, {self.sparsity}) needs both dimensions divisible by {self.size}, got a weight "
                f"of shape {tuple(shape)}. Choose another size, or leave this layer out of `targets`."
            )

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Returns whether every block is completely kept or removed, and enough are removed."""
        if keep.shape[0] % self.size or keep.shape[1] % self.size:
            return False
        tiles = self._tiles(keep)
        some, every = tiles.any(3).any(1), tiles.all(3).all(1)
        allowed = some.numel() - removed_units(self.sparsity, some.numel())
        return bool((some == every).all()) and int(some.sum()) <= allowed

    def _tiles(self, matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        return matrix.reshape(rows // self.size, self.size, columns // self.size, self.size)


@dataclass(frozen=True)
class Rows:
    """Whole output neurons: removes the `round(sparsity * out)` rows of least summed score; sparsity in [0, 1)."""

    sparsity: float

    removes_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sparsity("Rows", self.sparsity)

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]:
        """Returns the mask of the rows with the largest summed scores; see `Pattern`."""
        refuse_nan(scores)
        rows = scores.shape[0]
        kept = keep_largest(scores.sum(1), rows - removed_units(self.sparsity, rows))
        return kept[:, None].expand(scores.shape).contiguous()

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Accepts every shape."""

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Returns whether every row is completely kept or removed, and enough are removed."""
        some, rows = keep.any(1), keep.shape[0]
        return bool((some == keep.all(1)).all()) and int(some.sum()) <= rows - removed_units(self.sparsity, rows)


@dataclass(frozen=True)
class Columns:
    """Whole input features: removes the `round(sparsity * in)` columns of least summed score; sparsity in [0, 1)."""

    sparsity: float

    removes_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sparsity("Columns", self.sparsity)

    def keep(self, scores: Float[Tensor, "out in"], start: int = 0) -> Bool[Tensor, "out in"]:
        """Returns the mask of the columns with the largest summed scores; see `Pattern`."""
        refuse_nan(scores)
        columns = scores.shape[1]
        kept = keep_largest(scores.sum(0), columns - removed_units(self.sparsity, start + columns, start))
        return kept[None, :].expand(scores.shape).contiguous()

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Accepts every shape."""

    def holds(self, keep: Bool[Tensor, "out in"]) -> bool:
        """Returns whether every column is completely kept or removed, and enough are removed."""
        return Rows(self.sparsity).holds(keep.T)
