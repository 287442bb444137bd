"""What the decoder blocks are called with: hidden states in files, everything else once for all windows."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prune_callbacks.calibration.capture import Batch, BlockInputs, capture_one_by_one, change_tensors, run_block
from prune_callbacks.streaming.files import remove_folder, whole, write_tensors
from prune_callbacks.writing import PARTIAL, rename

HIDDEN = "hidden"
"""The name of the hidden states in their files."""


class StoredInputs(BlockInputs):
    """
    The inputs of a batch, with the hidden states in a file.

    Args:
        path: the file of the hidden states.
        calls: see `BlockInputs`.
        tokens: see `BlockInputs`.
    """

    def __init__(self, path: Path, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], tokens: Tensor | None) -> None:
        self.path = path
        self.calls = calls
        self.tokens = tokens

    @property
    def hidden(self) -> Tensor:  # type: ignore[override]
        """Read whenever it is asked for."""
        try:
            with safe_open(self.path, framework="pt") as file:
                view: Tensor = file.get_tensor(HIDDEN)
                return view.clone()  # aligned as any other tensor: kernels may round differently where it is not
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path}, with hidden states that enter a block, is missing or damaged ({error}): put it back and "
                "make the same call again, or delete the target to begin anew"
            ) from error


def store_inputs(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch], folder: Path
) -> list[StoredInputs]:
    """
    Captures what the blocks are called with; hidden states that enter the first block go into `folder`.

    Args:
        model: with weights in front of the blocks, and in the first one.
        blocks: its decoder blocks.
        batches: of token ids.
        folder: is complete if it is there; then nothing is written.
    """
    shared: dict[bytes, Tensor] = {}
    stored = []
    with _completing(folder) as partial:
        for number, batch in enumerate(capture_one_by_one(model, blocks, batches)):
            if partial is not None:
                write_tensors(partial / _name(number), {HIDDEN: whole(batch.hidden)})
            stored.append(StoredInputs(folder / _name(number), _once(batch.calls, shared), batch.tokens))
    return stored


def store_next(index: int, block: nn.Module, inputs: Sequence[StoredInputs], where: torch.device, folder: Path) -> None:
    """Runs block `index`; the hidden states that leave it are those of `inputs` then, in `folder`."""
    with _completing(folder) as partial:
        for number, batch in enumerate(inputs if partial is not None else ()):
            assert partial is not None
            write_tensors(partial / _name(number), {HIDDEN: whole(run_block(index, block, batch, where))})
    for number, batch in enumerate(inputs):
        batch.path = folder / _name(number)


@contextmanager
def _completing(folder: Path) -> Iterator[Path | None]:
    """A new folder under a temporary name, which gets its own in the end; None if the folder is already there."""
    if folder.exists():
        yield None
        return
    partial = folder.with_name(folder.name + PARTIAL)
    remove_folder(partial)
    partial.mkdir()
    yield partial
    rename(partial, folder, durable=True)


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _once(calls: list[tuple[tuple[Any, ...], dict[str, Any]]], shared: dict[bytes, Tensor]) -> list[Any]:
    """Arguments of blocks in which tensors that were met before, with the same values, are those that were met."""
    known: dict[int, Tensor] = {}

    def first(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:  # the calls hold their tensors, so that ids stay their own
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            mark = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
            mark.update(content.data)
            known[id(tensor)] = shared.setdefault(mark.digest(), tensor)
        return known[id(tensor)]

    return [change_tensors(call, first) for call in calls]


def described_batches(batches: Iterable[Batch]) -> Iterator[str]:
    """For every batch a line that tells it from others."""
    for batch in batches:
        parts = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        digest = hashlib.sha256()
        for name in sorted(parts):
            value = parts[name]
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(f"{name} {value!r}".encode())
        yield digest.hexdigest()[:16]
