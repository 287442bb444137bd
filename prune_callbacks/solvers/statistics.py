"""Streamed calibration statistics: sums over tokens, which add up over batches and ranks."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.ranks import Ranks

AT_ONCE = 2**25
"""How many numbers are converted to float32 at once, so that no 16-bit batch is copied as a whole."""

STRIP = 256
"""The minimum of features in a strip of a Gram, and of tokens for which strips with mirroring are faster."""


@runtime_checkable
class Statistic(Protocol):
    """A sum over the tokens that reach a layer. Raw activations are never kept."""

    @property
    def tokens(self) -> int:
        """Returns the number of input vectors summed so far."""

    def update(self, x: Float[Tensor, "*batch in"]) -> None:
        """Adds the input vectors `x`, of shape (..., in) and any floating dtype."""

    def reduce(self, ranks: Ranks) -> None:
        """Sums over the ranks, which have seen different tokens, in place; in float64 if any rank's sum is."""

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """Returns `||X_j||_2^2` of every input feature: the sum of its squares over all tokens."""


def _vectors(x: Tensor, total: Tensor) -> tuple[Iterator[Tensor], Tensor]:
    """Returns the rows of `x` in parts, and the running sum; both in float64 if either is, else in float32."""
    in_features = total.shape[-1]
    if x.shape[-1] != in_features:
        raise ValueError(f"expected inputs of shape (..., {in_features}), got {tuple(x.shape)}")
    if x.dtype == torch.float64:
        total = total.double()
    rows = x.detach().reshape(-1, in_features)
    return (part.to(total) for part in rows.split(max(1, AT_ONCE // in_features))), total


def _reduced(total: Tensor, tokens: int, ranks: Ranks) -> tuple[Tensor, int]:
    counts = ranks.sum(torch.tensor([tokens, int(total.dtype == torch.float64)]))
    return ranks.sum(total.double() if counts[1] else total), int(counts[0])


class Gram:
    """
    The Gram `G = X X^T`, the sum of `x x^T` over all tokens, which SparseGPT, MRP and ALPS need.

    `matrix` has shape (in, in). It is float32, or float64 after the first float64 inputs. No activations are stored.
    The sum is not divided by the number of tokens, because no mask and no result depends on its scale.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.matrix: Float[Tensor, "in in"] = torch.zeros(in_features, in_features, device=device, dtype=torch.float32)
        self.tokens = 0

    def update(self, x: Float[Tensor, "*batch in"]) -> None:
        """Adds `x^T x` for `x` of shape (..., in); see `Statistic`."""
        parts, self.matrix = _vectors(x, self.matrix)
        for rows in parts:
            if len(rows) < STRIP:
                self.matrix.addmm_(rows.T, rows)
            else:
                self._add_by_strips(rows)
            self.tokens += len(rows)

    def _add_by_strips(self, rows: Float[Tensor, "tokens in"]) -> None:
        """Adds `rows^T rows`, computing only the part right of the diagonal, in strips, and mirroring it."""
        for a in range(0, size := len(self.matrix), step := max(STRIP, -(-size // 8))):
            strip = self.matrix[a : a + step, a:]
            strip.addmm_(rows[:, a : a + step].T, rows[:, a:])
            self.matrix[a + step :, a : a + step] = strip[:, step:].T

    def reduce(self, ranks: Ranks) -> None:
        """Sums over the ranks; see `Statistic`."""
        self.matrix, self.tokens = _reduced(self.matrix, self.tokens, ranks)

    def merge(self, other: "Gram") -> None:
        """Adds the sum over other tokens of the same layer."""
        self.matrix += other.matrix.to(self.matrix)
        self.tokens += other.tokens

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """Returns the diagonal, (in,)."""
        return self.matrix.diagonal()


class InputNorm:
    """The sum of squares of every input feature, shape (in,), float32 or float64: the statistic of Wanda."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.squares: Float[Tensor, " in"] = torch.zeros(in_features, device=device, dtype=torch.float32)
        self.tokens = 0

    def update(self, x: Float[Tensor, "*batch in"]) -> None:
        """Adds the squares of `x` of shape (..., in); see `Statistic`."""
        parts, self.squares = _vectors(x, self.squares)
        for rows in parts:
            self.squares += rows.square().sum(0)
            self.tokens += len(rows)

    def reduce(self, ranks: Ranks) -> None:
        """Sums over the ranks; see `Statistic`."""
        self.squares, self.tokens = _reduced(self.squares, self.tokens, ranks)

    def merge(self, other: "InputNorm") -> None:
        """Adds the sum over other tokens of the same layer."""
        self.squares += other.squares.to(self.squares)
        self.tokens += other.tokens

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """Returns the sums of squares, (in,)."""
        return self.squares


def by_group(statistic: Any) -> list[Any]:
    """Returns the statistics of a layer's groups; of a layer without groups its own."""
    return statistic.parts if isinstance(statistic, GroupedStatistic) else [statistic]


class GroupedStatistic:
    """
    The statistics of a layer whose rows fall into groups, each with input features of its own: a grouped convolution.

    Args:
        parts: the empty statistic of every group.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    @property
    def tokens(self) -> int:
        """Returns the number of input vectors of every group."""
        return int(self.parts[0].tokens)

    def update(self, x: Float[Tensor, "*batch in"]) -> None:
        """Adds the input vectors `x` of all groups, (..., groups * in)."""
        for part, inputs in zip(self.parts, x.chunk(len(self.parts), -1), strict=True):
            part.update(inputs)

    def reduce(self, ranks: Ranks) -> None:
        """Sums over the ranks; see `Statistic`."""
        for part in self.parts:
            part.reduce(ranks)

    @property
    def squared_norm(self) -> Float[Tensor, " features"]:
        """Returns the sums of squares of all groups' features, (groups * in,)."""
        return torch.cat([part.squared_norm for part in self.parts])
