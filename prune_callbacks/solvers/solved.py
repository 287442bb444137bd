"""The result of a solver."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.float64 import sum_in_float64


class Solved(NamedTuple):
    """
    The result of a solver for one layer, or for several that are stacked.

    Attributes:
        weight: the new weights, (out, in).
        keep: the mask, (out, in); True = kept.
        loss: `sum over rows of d G d^T` of every layer, with `d = weight - dense` and the undamped Gram `G`, (layers,);
            None where the solver does not compute it.
        scale: the scale of every group of weights, (out, groups), where the solver also rounds; else None.
    """

    weight: Float[Tensor, "out in"]
    keep: Bool[Tensor, "out in"]
    loss: Float[Tensor, " layers"] | None = None
    scale: Float[Tensor, "out groups"] | None = None


def sum_by_layer(rows: Float[Tensor, " out"], heights: Sequence[int] | None) -> Float[Tensor, " layers"]:
    """Sums a value of each row over the rows of each stacked layer, in float64; `heights` None: a single layer."""
    parts = [rows] if heights is None else rows.split(list(heights))
    return torch.stack([sum_in_float64(part) for part in parts])
