"""GPTQ (Frantar et al. 2022): rounding to a grid in SparseGPT's sweep, every error pushed onto the columns to come."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose, masked, sweep, sweep_block

CLIPS = torch.linspace(1.0, 0.5, 26)
"""Shares of the largest magnitude that are tried as the end of a grid."""


@dataclass(frozen=True)
class Grid:
    """
    Whole multiples of a scale, symmetric about zero, so that zero stays zero.

    A weight is `scale * code` with a code in `-(2^(bits-1) - 1) .. 2^(bits-1) - 1`. A scale serves `group_size`
    neighbouring input features of one output row (the last group may be smaller), or the whole row; scales have the 11
    significant bits of float16, in which they are stored.

    Args:
        bits: of a code, 2 to 8.
        group_size: input features that share a scale; None: all of a row.
    """

    bits: int = 4
    group_size: int | None = 128

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits of a code must be 2 to 8, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is a number of input features and must be at least 1, got {self.group_size}")

    @property
    def largest(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def width(self, in_features: int) -> int:
        """Input features that share a scale."""
        return min(self.group_size or in_features, in_features)

    def groups(self, in_features: int) -> int:
        """Scales of a row."""
        return -(-in_features // self.width(in_features))

    def fit(
        self, weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None = None
    ) -> Float[Tensor, " out"]:
        """
        The scale for every row, all of whose weights share one; representable in float16, in the weight's dtype.

        Of the ends of the grid that `CLIPS` names, that with the least squared error, weighted by `importance`; 1 for a
        row of zeros.

        Raises:
            ValueError: a scale is too large for float16.
        """
        weighting = torch.ones_like(weight[0]) if importance is None else importance
        peak = weight.abs().amax(1)
        best, least = torch.ones_like(peak), torch.full_like(peak, torch.inf)
        for clip in CLIPS.tolist():
            scale = (clip * peak / self.largest).half().to(weight)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            error = (self.rounded(weight, scale[:, None]) - weight).square() @ weighting
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        if not bool(torch.isfinite(least).all()):
            raise ValueError(f"the largest weight, {float(peak.max()):.3g}, is too large for scales in float16")
        return best

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest codes, as floats; shapes broadcast."""
        return (weight / scale).round_().clamp_(-self.largest, self.largest)

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest points of the grid; shapes broadcast."""
        return self.codes(weight, scale).mul_(scale)

    def encode(self, weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Int8[Tensor, "out in"]:
        """
        The codes of weights that lie on the grid.

        Raises:
            ValueError: a weight does not lie on the grid, to the rounding of its dtype, or the scales are of another.
        """
        if scale.shape != (len(weight), self.groups(weight.shape[1])):
            raise ValueError(
                f"scales of shape {tuple(scale.shape)} for weights of shape {tuple(weight.shape)}: {self} has "
                f"{self.groups(weight.shape[1])} a row"
            )
        spread = self.spread(scale, weight.shape[1]).to(torch.promote_types(weight.dtype, torch.float32))
        codes = self.codes(weight.to(spread), spread)
        off = (codes * spread).to(weight.dtype) != weight
        if bool(off.any()):
            raise ValueError(
                f"{int(off.sum())} of {off.numel()} weights are not whole multiples of their scale: they were "
                f"rounded to another grid than {self}, or have changed since. Quantize last, after training"
            )
        return codes.to(torch.int8)

    def decode(
        self, codes: Int8[Tensor, "out in"], scale: Float[Tensor, "out groups"], dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        """`scale * code`, in float32 and then in `dtype`: the inverse of `encode`."""
        return (codes.float() * self.spread(scale, codes.shape[1]).float()).to(dtype)

    def spread(self, scale: Float[Tensor, "out groups"], in_features: int) -> Float[Tensor, "out in"]:
        """The scale of every weight."""
        return scale.repeat_interleave(self.width(in_features), 1)[:, :in_features]


def round_to_nearest(weight: Float[Tensor, "out in"], grid: Grid) -> tuple[Tensor, Tensor]:
    """Every weight at the nearest point of its group's grid, and the scales: what GPTQ is measured against."""
    scale = torch.stack([grid.fit(part) for part in weight.split(grid.width(weight.shape[1]), 1)], 1)
    return grid.rounded(weight, grid.spread(scale, weight.shape[1])), scale


def gptq(
    weight: Float[Tensor, "out in"],
    system: DampedGram,
    choose: Choose,
    step: int,
    block_size: int,
    grid: Grid,
    unseen: Float[Tensor, "out in"] | None = None,
    heights: Sequence[int] | None = None,
) -> Solved:
    """
    Rounds what `choose` keeps and removes the rest, in one sweep.

    Equivalent to Optimal Brain Surgeon applied to one column after another, left to right: the column is set to its
    nearest point of the grid, or to zero, and the error pushed onto the columns on its right (Frantar et al. 2022, eq.
    2 and 3; with a mask chosen on the way, the joint sparsification and quantization of Frantar & Alistarh 2023). A
    group's scales are fitted when the sweep reaches it, to its survivors as they would be without rounding inside of
    the group, by what their errors cost.

    Args:
        weight: dense weights, or pruned ones whose mask `choose` repeats.
        system: their damped Gram.
        choose: the mask of a slice of columns, from SparseGPT's scores `W_ij^2 / U_jj^2` and the number of the first.
        step: columns whose mask is chosen together.
        block_size: columns that are updated together; a multiple of `step`. A group must lie in one block, or begin
            where one does.
        grid: what is rounded to.
        unseen: weights that give the scales to groups whose features are all dead; None: such weights become 0, and no
            scale matters.
        heights: the numbers of rows of the layers that are stacked in `weight`; None: it is one layer.

    Returns:
        The result, whose `loss` is that against `weight`, and whose scales are in the weight's dtype.
    """
    scales: list[Tensor] = []
    width = grid.width(weight.shape[1])
    factor, diagonal = system.inverse_factor, system.inverse_factor.diagonal()

    def mask(current: Tensor, start: int) -> Tensor:
        return choose((current / diagonal[start : start + current.shape[1]]).square(), start)

    def settle(j: int, ahead: Tensor, kept: Tensor) -> Tensor:
        if j % width == 0:
            # Pruning makes survivors grow: the grid must reach as far as they will.
            foreseen, part = ahead[:width].clone(), slice(j, j + width)
            if bool((foreseen * ~mask(foreseen.T, j).T).any()):
                sweep_block(foreseen, factor[part, part], foreseen.bool(), mask, min(step, width), masked, j)
            # What rounding a column costs once those behind it make up for it.
            cost, dead = diagonal[part].square().reciprocal(), system.dead[part]
            if unseen is not None and bool(dead.all()):
                foreseen = unseen.T[part]
            scales.append(grid.fit(foreseen.T, cost))
        return grid.rounded(ahead[0], scales[-1]).mul_(kept)

    solved = sweep(weight, system, mask, step, block_size, settle, heights)
    return solved._replace(scale=torch.stack(scales, 1))
