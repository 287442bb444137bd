"""GPTQ (Frantar et al. 2022): rounds to a grid in SparseGPT's sweep, compensating errors in the later columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.precision import full_precision
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose, masked, sweep, sweep_block

CLIPS = torch.linspace(1.0, 0.5, 26)
"""Fractions of the largest magnitude that are tried as the largest value of a grid."""


@dataclass(frozen=True)
class Grid:
    """
    A symmetric grid of whole multiples of a scale; zero lies on it, so pruned weights stay zero.

    A weight is `scale * code` with a code in `-(2^(bits-1) - 1) .. 2^(bits-1) - 1`. One scale serves a group of
    `group_size` neighbouring input features of one output row (the last group may be smaller), or the whole row.
    Scales are stored in float16, so they have 11 significant bits.

    Args:
        bits: bits of a code, 2 to 8.
        group_size: input features that share a scale; None: all features of a row.

    Raises:
        ValueError: `bits` or `group_size` is out of range.
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
        """Returns the largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def width(self, in_features: int) -> int:
        """Returns the number of input features that share a scale."""
        return min(self.group_size or in_features, in_features)

    def groups(self, in_features: int) -> int:
        """Returns the number of scales of a row."""
        return -(-in_features // self.width(in_features))

    def fit(
        self, weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None = None
    ) -> Float[Tensor, " out"]:
        """
        Returns one scale for each row, in the weight's dtype and representable in float16; 1 for a row of zeros.

        Of the clipping fractions in `CLIPS` it takes the one of least squared error, weighted by `importance`.

        Args:
            weight: one group of every row.
            importance: the weight of each input feature's squared error; None: 1.

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
        """Returns the nearest codes, as floats; shapes broadcast."""
        return (weight / scale).round_().clamp_(-self.largest, self.largest)

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Returns the nearest points of the grid; shapes broadcast."""
        return self.codes(weight, scale).mul_(scale)

    def encode(self, weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"]) -> Int8[Tensor, "out in"]:
        """
        Returns the codes of weights that lie on the grid.

        Raises:
            ValueError: a weight does not lie on the grid, up to the rounding of its dtype, or the shape of the scales
                belongs to another grid.
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
        """Returns `scale * code`, computed in float32 and cast to `dtype`: the inverse of `encode`."""
        return (codes.float() * self.spread(scale, codes.shape[1]).float()).to(dtype)

    def spread(self, scale: Float[Tensor, "out groups"], in_features: int) -> Float[Tensor, "out in"]:
        """Returns the scale of every weight."""
        return scale.repeat_interleave(self.width(in_features), 1)[:, :in_features]


def round_to_nearest(weight: Float[Tensor, "out in"], grid: Grid) -> tuple[Tensor, Tensor]:
    """Rounds every weight to the nearest point of its group's grid, GPTQ's baseline; returns weights and scales."""
    scale = torch.stack([grid.fit(part) for part in weight.split(grid.width(weight.shape[1]), 1)], 1)
    return grid.rounded(weight, grid.spread(scale, weight.shape[1])), scale


@full_precision()
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
    Rounds the weights that `choose` keeps and removes the others, in one sweep.

    Equivalent to Optimal Brain Surgeon applied to one column after another, left to right: the column is set to its
    nearest point of the grid, or to zero, and its error is compensated in the columns on its right (Frantar et al.
    2022, eq. 2 and 3). Where `choose` picks the mask during the sweep, it is the joint sparsification and quantization
    of Frantar & Alistarh 2023.

    A group's scales are fitted when the sweep reaches it. They are fitted to the survivors as pruning alone, without
    rounding inside the group, would leave them. Each column's error is weighted by its cost after compensation.

    Args:
        weight: dense weights, or pruned ones whose mask `choose` repeats; (out, in), float32 or float64.
        system: their damped Gram.
        choose: returns the mask of a slice of columns, given SparseGPT's scores `W_ij^2 / U_jj^2` and the index of the
            slice's first column.
        step: columns whose mask is chosen together.
        block_size: columns that are updated together; a multiple of `step`. A group must lie inside one block, or
            begin at the first column of one.
        grid: the grid to round to.
        unseen: weights that determine the scales of groups whose features are all dead; None: the weights of such
            groups become 0 and their scales do not matter.
        heights: the numbers of rows of the layers that are stacked in `weight`; None: a single layer.

    Returns:
        The result. Its `loss` is taken against `weight`; its scales, (out, groups), are in the weight's dtype.

    Raises:
        ValueError: a scale is too large for float16.
    """
    scales: list[Tensor] = []
    width = grid.width(weight.shape[1])
    factor, diagonal = system.inverse_factor, system.inverse_factor.diagonal()

    def mask(current: Tensor, start: int) -> Tensor:
        return choose((current / diagonal[start : start + current.shape[1]]).square(), start)

    def settle(j: int, ahead: Tensor, kept: Tensor) -> Tensor:
        if j % width == 0:
            # Compensation for pruning makes survivors grow, and the grid must reach their final values.
            foreseen, part = ahead[:width].clone(), slice(j, j + width)
            if bool((foreseen * ~mask(foreseen.T, j).T).any()):
                sweep_block(foreseen, factor[part, part], foreseen.bool(), mask, min(step, width), masked, j)
            # The loss of a column's rounding error once the later columns have compensated it.
            cost, dead = diagonal[part].square().reciprocal(), system.dead[part]
            if unseen is not None and bool(dead.all()):
                foreseen = unseen.T[part]
            scales.append(grid.fit(foreseen.T, cost))
        return grid.rounded(ahead[0], scales[-1]).mul_(kept)

    solved = sweep(weight, system, mask, step, block_size, settle, heights)
    return solved._replace(scale=torch.stack(scales, 1))
