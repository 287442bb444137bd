"""
Stable selection of an exact number of the largest scores.

Ties go to the lowest index. N:M groups are ranked by the same rule in `patterns.NM.keep`, without this module.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from prune_callbacks.ranks import ALONE, Ranks

DIGIT = 16
"""Bits of the scores that one pass of the selection over several tensors reads."""


def keep_largest(scores: Float[Tensor, "*batch n"], kept: int) -> Bool[Tensor, "*batch n"]:
    """
    Marks the `kept` largest scores along the last dimension.

    Equivalent to taking the first `kept` positions of a stable descending sort, so that among equal scores the lowest
    index is kept. It selects by a threshold instead of sorting.

    Args:
        scores: shape (..., n), any floating dtype, no NaN; infinities are allowed.
        kept: how many scores to keep in every row, 0 <= kept <= n.
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
    return _drop_last_ties(keep, scores == threshold, kept)


def _drop_last_ties(keep: Tensor, tied: Tensor, kept: int) -> Tensor:
    """
    Returns `keep` without the last tied scores of every row, so that `kept` are left; may share its memory.

    It lists the tied scores, mostly few, because counting along whole rows would take 8 bytes per score.
    """
    extra = count_true(keep).flatten() - kept
    # A row drops the last `extra` of its listed ties. `goes` numbers the dropped ties of all rows from 0; adding the
    # row's offset gives their places in the list.
    ends = count_true(tied).flatten().cumsum(0)
    goes = torch.arange(int(extra.sum()), device=keep.device)
    goes += (ends - extra.cumsum(0)).repeat_interleave(extra)
    kept_places = keep.flatten()
    kept_places[tied.flatten().nonzero()[:, 0][goes]] = False
    return kept_places.view(keep.shape)


def count_true(flags: Bool[Tensor, "*batch n"]) -> Int64[Tensor, "*batch"]:
    """Counts the flags that are set along the last dimension; equivalent to `flags.sum(-1)`."""
    if flags.device.type != "cpu":
        return flags.sum(-1)
    # On CPUs torch first converts every flag to 8 bytes and takes ten times as long.
    return torch.as_tensor(np.count_nonzero(flags.numpy(), axis=-1))


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
    """Raises ValueError for scores with NaN, which cannot be ordered."""
    # The maximum of numbers with a NaN among them is NaN, and takes one pass without a copy.
    if scores.numel() and bool(torch.isnan(scores.amax())):
        count = int(torch.isnan(scores).sum())
        raise ValueError(
            f"scores contain NaN ({count} of {scores.numel()}); every score must be comparable. "
            "Check the weights and the calibration activations for NaN or inf."
        )


def keep_largest_of_all(
    scores: Mapping[str, Float[Tensor, "..."]], kept: int, ranks: Ranks = ALONE
) -> Iterator[tuple[str, Bool[Tensor, "..."]]]:
    """
    Yields, tensor by tensor, the name and the mask of the `kept` largest scores of all tensors together.

    Equivalent to `keep_largest` on the flat concatenation of all scores in the mapping's order, so that among equal
    scores the first are kept. The concatenation is never made. A radix selection finds the threshold from histograms
    over 16 bits of the scores at a time, and histograms add up over tensors.

    Histograms also add up over ranks. Each rank may hold a part of every tensor, possibly an empty one, and gets the
    mask of its part; the parts follow each other in the order of the ranks. The ranks communicate a few histograms of
    half a megabyte and one count per tensor.

    Args:
        scores: tensors of any shapes and floating dtypes, on any devices; no NaN, infinities are allowed. Each tensor
            is read several times, one tensor at a time, so a mapping may compute them on access.
        kept: how many scores to keep in all.
        ranks: the processes that hold the parts; each calls this with the same names in the same order.

    Raises:
        ValueError: scores contain NaN; on every rank.
    """
    total, double = _checked_sizes(scores, ranks)
    if kept <= 0 or kept >= total:
        for name, values in scores.items():
            yield name, torch.full_like(values, kept > 0, dtype=torch.bool)
        return
    threshold, left = _threshold(scores, kept, double, ranks)
    ties = torch.tensor([int((_ordered(v, double) == threshold).count_nonzero()) for v in scores.values()])
    everywhere = ranks.sum(ties.clone())
    before = everywhere.cumsum(0) - everywhere + ranks.before(ties)
    for (name, values), passed in zip(scores.items(), before.tolist(), strict=True):
        keys = _ordered(values, double)
        equal = keys == threshold
        equal &= (equal.flatten().cumsum(0) <= left - passed).view(equal.shape)
        yield name, (keys > threshold) | equal


def _checked_sizes(scores: Mapping[str, Tensor], ranks: Ranks) -> tuple[int, bool]:
    """Returns the number of scores on all ranks, and whether any are float64; raises ValueError for NaN."""

    def check() -> tuple[int, bool]:
        total, double = 0, False
        for name, values in scores.items():
            try:
                refuse_nan(values)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            total += values.numel()
            double |= values.dtype == torch.float64
        return total, double

    parts = ranks.gather(ranks.attempt(check))
    return sum(total for total, _ in parts), any(double for _, double in parts)


def _threshold(scores: Mapping[str, Tensor], kept: int, double: bool, ranks: Ranks) -> tuple[int, int]:
    """Returns the key of the `kept`-th largest score, and how many of the scores equal to it are kept."""
    bits = 64 if double else 32
    prefix, left = 0, kept
    for shift in range(bits - DIGIT, -1, -DIGIT):
        histogram = torch.zeros(2**DIGIT, dtype=torch.int64)
        for values in scores.values():
            keys = _ordered(values, double).flatten()
            if shift == bits - DIGIT:  # the first digit carries the sign
                digits = (keys >> shift) + 2 ** (DIGIT - 1)
            else:
                digits = (keys[(keys >> (shift + DIGIT)) == prefix] >> shift) & (2**DIGIT - 1)
            histogram += torch.bincount(digits, minlength=2**DIGIT).cpu()
        ranks.sum(histogram)
        reached = histogram.flip(0).cumsum(0)  # how many have this digit or a larger one
        place = int(torch.searchsorted(reached, left))
        left -= int(reached[place] - histogram.flip(0)[place])
        digit = 2**DIGIT - 1 - place
        prefix = digit - 2 ** (DIGIT - 1) if shift == bits - DIGIT else (prefix << DIGIT) + digit
    return prefix, left


def _ordered(values: Tensor, double: bool) -> Tensor:
    """Returns integers that sort as the values do: their bits, inverted for negative numbers."""
    values = values.detach().to(torch.float64 if double else torch.float32) + 0  # -0 and +0 are equal
    bits = values.view(torch.int64) if double else values.view(torch.int32).long()
    largest = torch.iinfo(torch.int64 if double else torch.int32).max
    return torch.where(bits < 0, bits ^ largest, bits)
