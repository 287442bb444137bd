"""Exact-count, stable selection of the largest scores."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def keep_largest(scores: Float[Tensor, "*batch n"], kept: int) -> Bool[Tensor, "*batch n"]:
    """
    Marks the `kept` largest scores along the last dimension.

    Equivalent to a stable descending sort of which the first `kept` positions are taken: among equal
    scores the lowest index is kept. Selection by a threshold, so no full sort is made.

    Args:
        scores: shape (..., n), any floating dtype, no NaN; infinities are allowed.
        kept: how many to keep in every row, 0 <= kept <= n.
    """
    n = scores.shape[-1]
    if kept >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if kept <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_largest(scores, kept)
    keep = scores >= threshold
    if int(torch.count_nonzero(keep)) == kept * keep[..., 0].numel():
        return keep
    above = scores > threshold
    tied = keep & ~above
    missing = kept - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= missing))


def _kth_largest(scores: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch 1"]:
    n = scores.shape[-1]
    if scores.device.type != "cpu":
        return scores.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    # On CPUs numpy's introselect takes a tenth of the time of torch.kthvalue, topk or sort
    # (0.7 ms against 13, 41 and 76 ms for 576 x 1536 scores on two cores).
    values = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    part = np.partition(values.detach().numpy(), n - k, axis=-1)[..., n - k : n - k + 1]
    return torch.from_numpy(np.ascontiguousarray(part)).to(scores.dtype)


def refuse_nan(scores: Tensor) -> None:
    """Raises ValueError if a score is NaN: no order can be given to it."""
    # The largest of numbers with a NaN among them is NaN: one pass, no copy.
    if scores.numel() and bool(torch.isnan(scores.amax())):
        count = int(torch.isnan(scores).sum())
        raise ValueError(
            f"scores contain NaN ({count} of {scores.numel()}); every score must be comparable. "
            "Check the weights and the calibration activations for NaN or inf."
        )
