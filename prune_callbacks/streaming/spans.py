"""Reads parts of a checkpoint's weights: of every parameter the span that a rank holds, and no more."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prune_callbacks.streaming.places import Conversion, Place
from prune_callbacks.streaming.source import PIECE_BYTES, CheckpointFolder, opened


class Part(NamedTuple):
    """
    The part of a parameter that a rank holds.

    Attributes:
        name: the parameter's name in the model.
        start: its first index in the flattened parameter.
        values: where it goes, flat: a view of what the rank holds.
    """

    name: str
    start: int
    values: Tensor


@dataclass
class SpanReader:
    """
    Fills parts of parameters from a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        model: its model; see `find_places`.
        places: the source of every weight.
        bytes_read: how many bytes of weights have been read so far.
    """

    checkpoint: CheckpointFolder
    model: PreTrainedModel
    places: dict[str, Place]
    bytes_read: int = 0

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """
        Copies the values of a part from the files, cast to its dtype.

        Of a weight that has a tensor of its own, only the rows with the span are read, some megabytes at a time. A
        weight that is made of several when it is loaded (experts) is made whole, and dropped again.
        """
        if not part.values.numel():
            return
        place = self.places[part.name]
        if isinstance(place, Conversion):
            views = self.checkpoint.views(key for _, key in place.keys)
            self.bytes_read += sum(view.nbytes for view in views.values())
            whole = place.convert(self.model, views)[part.name].flatten()
            part.values.copy_(whole[part.start : part.start + part.values.numel()])
            return
        for begin, piece in self._pieces(place, part.start, part.start + part.values.numel()):
            self.bytes_read += piece.nbytes
            first, last = max(begin, part.start), min(begin + piece.numel(), part.start + part.values.numel())
            part.values[first - part.start : last - part.start].copy_(piece[first - begin : last - begin])

    def _pieces(self, key: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the rows of a tensor that hold a span, flat, each with its first index in the flattened tensor."""
        entry = self.checkpoint.entries[key]
        row = torch.Size(entry.shape[1:]).numel()
        step = max(1, PIECE_BYTES // max(1, (entry.dtype or torch.uint8).itemsize * row))
        for begin in range(start // row, -(-stop // row), step):
            with opened(entry.file) as file:  # an open file keeps in memory all pages that were read
                rows = file.get_slice(key)[begin : min(begin + step, -(-stop // row))] if entry.shape else None
                yield begin * row, (file.get_tensor(key) if rows is None else rows).flatten()
