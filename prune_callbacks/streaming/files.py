"""Files that are written completely or not at all, and safetensors files written one tensor at a time."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prune_callbacks.writing import whole_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that are read and written here, by their names in safetensors files."""


@dataclass(frozen=True)
class Pieces:
    """
    A tensor that is written piece by piece, without being held whole in memory.

    Attributes:
        dtype: dtype of the tensor.
        shape: shape of the tensor.
        read: yields consecutive pieces of the tensor along its first dimension.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the whole tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def whole(tensor: Tensor) -> Pieces:
    """Returns a tensor as a single piece."""
    return Pieces(tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


def write_tensors(path: Path, tensors: Mapping[str, Pieces], metadata: Mapping[str, str] | None = None) -> None:
    """
    Writes a safetensors file, which gets its name only once it is complete.

    The bytes of the file depend on the tensors and the metadata only. safetensors' own `save_file` needs all tensors in
    memory at once, and its error does not say that the disk is full.

    Args:
        path: the file.
        tensors: tensors by name.
        metadata: text values for the header of the file.

    Raises:
        ValueError: the disk is full; see `writing`.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Wide dtypes first, as safetensors orders them: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        entry = {"dtype": names[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            for piece in tensors[name].read():
                file.write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert file.tell() == 8 + len(text) + end


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a mapping to a JSON file; see `writing`."""
    with writing(path) as file:
        file.write(json.dumps(record, indent=1).encode())


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """
    Yields a binary file, which gets its name once it is complete and synced to the disk.

    Raises:
        ValueError: the disk is full, or a quota is used up. An earlier file at `path` is untouched.
    """
    try:
        with whole_file(path, durable=True) as partial, partial.open("wb") as file:
            yield file
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk is full ({error.strerror}) while {path} was written. Finished blocks are kept: make room and "
            "repeat the same call, which resumes after them"
        ) from error


def copy_file(old: Path, new: Path) -> None:
    """Copies the content of `old` to `new`; see `writing`."""
    with old.open("rb") as source, writing(new) as file:
        shutil.copyfileobj(source, file)


def remove_folder(folder: Path) -> None:
    """Removes a folder if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


def size_of(folder: Path) -> int:
    """Returns the bytes of all files in a folder; 0 if the folder does not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def sizes(*paths: Path) -> dict[str, int]:
    """Returns the bytes of the files that exist, by file name."""
    return {path.name: path.stat().st_size for path in paths if path.is_file()}
