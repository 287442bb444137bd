"""Cuts calibration batches into single windows, and puts the windows of all ranks into one order."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from prune_callbacks.calibration.batches import Batch, OwnStep, named_inputs
from prune_callbacks.calibration.described import described
from prune_callbacks.ranks import Ranks
from prune_callbacks.reconstruction.settings import BlockReconstruction


class Windows(NamedTuple):
    """
    The calibration windows of all ranks.

    Attributes:
        mine: those of this rank, each a batch of its own.
        order: the owners of all windows, (rank, number in its `mine`), in an order by their contents. So it does not
            matter to a training which rank has which window. Batches that only the user's own step can read come first,
            in their own order.
    """

    mine: list[Batch]
    order: list[tuple[int, int]]


def single_windows(batches: Iterable[Any], settings: BlockReconstruction, ranks: Ranks) -> Windows:
    """
    Cuts the batches of every rank into single windows; a collective of the ranks.

    A batch that only a step of the user's own can read, or whose tensors leave it open which dimension counts the
    windows, is taken as one window.

    Raises:
        ValueError: a batch holds NaN or inf, or there are too few windows to hold some out.
    """
    given = ranks.attempt(lambda: [named_inputs(batch) for batch in batches])
    mine = ranks.attempt(lambda: [window for number, batch in enumerate(given) for window in _cut(batch, number)])
    keys = ranks.gather(["" if isinstance(window, OwnStep) else described(window) for window in mine])
    order = by_content(keys)
    count = len(order)
    if count and count_held_out(settings, count) == count:
        raise ValueError(
            f"reconstruction holds out {settings.held_out:.1%} of the calibration windows, at least one, and there "
            f"{'is' if count == 1 else 'are'} {count}, so none is left to train on: give more windows, or held_out=0"
        )
    return Windows(mine, order)


def by_content(keys: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Returns the `order` of `Windows`, given for every rank the hashes of its windows; see `described`."""
    found = sorted((key, number, rank) for rank, own in enumerate(keys) for number, key in enumerate(own))
    return [(rank, number) for _, number, rank in found]


def count_held_out(settings: BlockReconstruction, count: int) -> int:
    """Returns how many of the windows are held out: the last ones of their order."""
    return math.ceil(settings.held_out * count)


def _cut(batch: Batch, number: int) -> Sequence[Batch]:
    """Cuts a batch into windows: every tensor with as many rows as the main input; others belong to all windows."""
    parts = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch) if isinstance(batch, Mapping) else {}
    tensors = {key: value for key, value in parts.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"calibration batch {number} holds NaN or inf in {key}")
    rows = _rows(tensors)
    if rows < 2:
        return [batch]
    cut = [
        {key: value[row : row + 1] if _has_rows(value, rows) else value for key, value in parts.items()}
        for row in range(rows)
    ]
    return [window["input_ids"] for window in cut] if isinstance(batch, Tensor) else cut


def _rows(tensors: Mapping[str, Tensor]) -> int:
    """Returns how many windows a batch has; 1 for one that cannot be cut."""
    main = next((tensors[key] for key in ("input_ids", "inputs_embeds") if key in tensors), None)
    if main is not None:
        rows = main.shape[0] if main.ndim > 1 else 1
        # Positions on several axes, (axes, batch, tokens), are integers of three dimensions.
        known = all(
            value.ndim == 0 or (value.shape[0] in (1, rows) and (value.ndim < 3 or value.is_floating_point()))
            for value in tensors.values()
        )
        return rows if known else 1
    counts = {value.shape[0] if value.ndim else 1 for value in tensors.values()}
    return counts.pop() if len(counts) == 1 else 1


def _has_rows(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows
