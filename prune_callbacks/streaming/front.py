"""Loads what a capture of block inputs runs: the modules in front of the decoder blocks, and the first block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.names import names_by_tensor
from prune_callbacks.calibration.batches import Batch
from prune_callbacks.ranks import EverywhereError, Ranks
from prune_callbacks.streaming.skeleton import drop, fill
from prune_callbacks.streaming.source import CheckpointFolder


class OtherTokensError(EverywhereError):
    """A model looks up embeddings of tokens that no calibration batch holds, as of a prompt of its own."""


class Front:
    """
    The weights outside of the blocks that a capture reads.

    Args:
        checkpoint: the checkpoint.
        model: its model on the meta device.
        outside: the names in the checkpoint of the weights outside of the blocks, by name in the model.
        batches: the calibration batches of this rank; maybe none.
        ranks: the processes, each with its own batches.
    """

    def __init__(
        self,
        checkpoint: CheckpointFolder,
        model: PreTrainedModel,
        outside: Mapping[str, str],
        batches: Sequence[Batch],
        ranks: Ranks,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.ranks = ranks
        self._any = bool(batches)
        self._embedding: Any = model.get_input_embeddings()
        ids: list[Any] = [batch.get("input_ids") if isinstance(batch, Mapping) else batch for batch in batches]
        self._ids = [batch for batch in ids if _are_ids(batch)]
        plain = len(self._ids) == len(ids) > 0 and isinstance(self._embedding, nn.Embedding)
        self._names = self._names_of(outside)
        self._table = next(
            (key for key, names in self._names.items() if plain and any(map(self._is_embedding, names))), None
        )

    def _names_of(self, outside: Mapping[str, str]) -> dict[str, list[str]]:
        """
        Returns all names in the model of every weight outside of the blocks, by its name in the checkpoint.

        The output layer is left out, because a capture ends in front of it.
        """
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        ends = head is not None and head is not self._embedding
        place = next((name for name, module in self.model.named_modules() if module is head), None) if ends else None
        found = names_outside(self.model, outside)
        if place is not None:
            found = {key: [n for n in names if not n.startswith(f"{place}.")] for key, names in found.items()}
        return {key: names for key, names in found.items() if names}

    def _is_embedding(self, name: str) -> bool:
        owner, _, last = name.rpartition(".")
        return last == "weight" and self.model.get_submodule(owner) is self._embedding

    def run(self, work: Callable[[], list[Any]]) -> list[Any]:
        """
        Returns the result of `work`, for which the weights are loaded; a collective.

        Of the embeddings only the rows of the calibration tokens are loaded, unless the model looks up others. A rank
        without batches loads nothing.
        """
        try:
            return self._loaded(work, self._table)
        except OtherTokensError:
            return self._loaded(work, None)

    def _loaded(self, work: Callable[[], list[Any]], table: str | None) -> list[Any]:
        with ExitStack() as stack:
            self.ranks.attempt(lambda: self._load(table, stack) if self._any else None)
            return work()

    def _load(self, table: str | None, stack: ExitStack) -> None:
        names = {key: names for key, names in self._names.items() if key != table}
        stack.enter_context(filled(self.model, self.checkpoint, names))
        if table is not None:
            stack.enter_context(self._rows_only(table))

    @contextmanager
    def _rows_only(self, key: str) -> Iterator[None]:
        """Temporarily keeps only the embedding rows of the calibration tokens, and maps token ids to those rows."""
        used = torch.cat([ids.flatten() for ids in self._ids if ids is not None]).unique().long().cpu()
        rows, begin = [], 0
        for piece in self.checkpoint.pieces(key):
            here = used[(used >= begin) & (used < begin + len(piece))]
            rows.append(piece[here - begin])
            begin += len(piece)
        embedding = self._embedding
        empty = embedding.weight  # on the meta device
        embedding.weight = nn.Parameter(torch.cat(rows).to(empty.dtype), requires_grad=False)
        numbers = torch.full((begin,), -1).index_put_((used,), torch.arange(len(used)))

        def numbered(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            row = numbers[args[0]]
            if bool((row < 0).any()):
                raise OtherTokensError
            return row, *args[1:]

        hook = embedding.register_forward_pre_hook(numbered)
        try:
            yield
        finally:
            hook.remove()
            embedding.weight = empty


def names_outside(model: nn.Module, outside: Mapping[str, str]) -> dict[str, list[str]]:
    """
    Returns all names in the model of every weight outside of the blocks, by its name in the checkpoint.

    A tied weight has several. Call it before anything is filled, which makes two weights of a tied one.
    """
    tensors, alike = model.state_dict(keep_vars=True), names_by_tensor(model)
    return {key: alike[id(tensors[name])] for name, key in outside.items()}


@contextmanager
def filled(model: nn.Module, checkpoint: CheckpointFolder, names: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Fills weights of a model from a checkpoint, under all of their names, and drops them on exit."""
    views, filling = checkpoint.views(names), [name for key in names for name in names[key]]
    try:
        fill(model, {name: views[key] for key in names for name in names[key]})
        yield
    finally:
        drop(model, filling)


def _are_ids(given: Any) -> bool:
    """Returns whether a value is a tensor of token ids; the forward pass refuses anything else with the reason."""
    return isinstance(given, Tensor) and given.dtype in (torch.int64, torch.int32)
