"""The inputs of the decoder blocks: hidden states in files, all other arguments stored once for all windows."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prune_callbacks.calibration.batches import Batch, change_tensors
from prune_callbacks.calibration.capture import capture_one_by_one, run_block
from prune_callbacks.calibration.stand_ins import BlockInputs, Call
from prune_callbacks.ranks import Ranks
from prune_callbacks.streaming.files import remove_folder, whole, write_tensors
from prune_callbacks.writing import PARTIAL, rename

HIDDEN = "hidden"
"""The name of the hidden states in their files."""


class StoredInputs(BlockInputs):
    """
    The inputs of a block for one calibration batch, with the hidden states in a file.

    Args:
        path: the safetensors file with the hidden states.
        calls: see `BlockInputs`.
        tokens: see `BlockInputs`.
        place: see `BlockInputs`.
    """

    def __init__(self, path: Path, calls: list[Call | None], tokens: Tensor | None, place: int | str) -> None:
        self.path = path
        self.calls = calls
        self.tokens = tokens
        self.place = place

    def beside_in(self, folder: Path | None) -> "StoredInputs":
        """Returns the same windows with other hidden states: those in a folder; None: the same ones, for now."""
        path = self.path if folder is None else folder / self.path.name
        return StoredInputs(path, self.calls, self.tokens, self.place)

    @property
    def hidden(self) -> Tensor:  # type: ignore[override]
        """Reads the hidden states from the file on every access; raises ValueError if it is missing or damaged."""
        try:
            with safe_open(self.path, framework="pt") as file:
                view: Tensor = file.get_tensor(HIDDEN)
                return view.clone()  # aligned memory: kernels may round differently on unaligned tensors
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path}, with hidden states that enter a block, is missing or damaged ({error}): put it back and "
                "repeat the same call, or delete the target to start again"
            ) from error


def store_inputs(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch], folder: Path, ranks: Ranks
) -> list[StoredInputs]:
    """
    Captures the inputs of the blocks; hidden states that enter the first block are written to `folder`.

    Args:
        model: a model whose modules before the blocks, and whose first block, have weights.
        blocks: the decoder blocks of the model.
        batches: calibration batches of token ids, of this rank; maybe none.
        folder: the folder of the hidden states. If it exists, it is complete, and nothing is written.
        ranks: the processes, each with its own batches, that share the folder.

    Returns:
        the inputs of the first block, one entry for each batch.
    """
    shared: dict[bytes, Tensor] = {}

    def store(partial: Path | None) -> list[StoredInputs]:
        stored = []
        captured = capture_one_by_one(model, blocks, batches) if batches else ()
        for number, batch in enumerate(captured):
            if partial is not None:
                write_tensors(partial / _name(number, ranks), {HIDDEN: whole(batch.hidden)})
            calls = _once(batch.calls, shared)
            stored.append(StoredInputs(folder / _name(number, ranks), calls, batch.tokens, batch.place))
        return stored

    with _completing(folder, ranks) as partial:
        return ranks.attempt(lambda: store(partial))


def store_next(
    index: int, block: nn.Module, inputs: Sequence[StoredInputs], where: torch.device, folder: Path, ranks: Ranks
) -> None:
    """Runs block `index`, writes its outputs to `folder`, and makes them the hidden states of `inputs`."""

    def store(partial: Path | None) -> None:
        for number, batch in enumerate(inputs if partial is not None else ()):
            assert partial is not None
            write_tensors(partial / _name(number, ranks), {HIDDEN: whole(run_block(index, block, batch, where))})

    with _completing(folder, ranks) as partial:
        ranks.attempt(lambda: store(partial))
    for number, batch in enumerate(inputs):
        batch.path = folder / _name(number, ranks)


@contextmanager
def _completing(folder: Path, ranks: Ranks) -> Iterator[Path | None]:
    """
    Yields a new folder under a temporary name and renames it at the end; yields None if `folder` exists.

    Rank 0 makes and renames it for all ranks; a collective.
    """
    partial = folder.with_name(folder.name + PARTIAL)

    def begin() -> bool:
        if folder.exists():
            return False
        remove_folder(partial)
        partial.mkdir()
        return True

    begun = ranks.first(begin)
    yield partial if begun else None
    if begun:
        ranks.first(lambda: rename(partial, folder, durable=True))


def _name(number: int, ranks: Ranks) -> str:
    """Returns the name of the file of a rank's batch, by the number of the batch among those of all ranks."""
    return f"{number * ranks.size + ranks.rank:05d}.safetensors"


def _once(calls: list[Call | None], shared: dict[bytes, Tensor]) -> list[Call | None]:
    """Returns the arguments of the blocks, with equal tensors replaced by the one that is in `shared`."""
    known: dict[int, Tensor] = {}

    def first(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:  # the calls keep their tensors alive, so no id is used twice
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            mark = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
            mark.update(content.data)
            known[id(tensor)] = shared.setdefault(mark.digest(), tensor)
        return known[id(tensor)]

    return [change_tensors(call, first) for call in calls]
