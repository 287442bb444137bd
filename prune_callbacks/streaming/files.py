"""Files that are there whole or not at all, and safetensors files written one tensor at a time."""

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
"""What safetensors calls the dtypes that are read and written here."""


@dataclass(frozen=True)
class Pieces:
    """
    A tensor that is written without being held whole.

    Attributes:
        dtype: of the tensor.
        shape: of the tensor.
        read: makes its consecutive pieces along the first dimension, one after another.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def whole(tensor: Tensor) -> Pieces:
    """A tensor in one piece."""
    return Pieces(tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


def write_tensors(path: Path, tensors: Mapping[str, Pieces], metadata: Mapping[str, str] | None = None) -> None:
    """
    Writes a safetensors file, whose bytes depend on the tensors alone, and which is there only once it is complete.

    (safetensors' own `save_file` wants all tensors at once, and of a full disk it says only that it failed.)

    Raises:
        ValueError: the disk is full; see `writing`.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Wide dtypes first, as safetensors has them: every tensor then lies at a multiple of its own width.
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
    """Writes a JSON file; see `writing`."""
    with writing(path) as file:
        file.write(json.dumps(record, indent=1).encode())


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """
    Opens a file that gets its name once it is complete and on the disk.

    Raises:
        ValueError: the disk is full, or a quota is used up. What was there before is untouched.
    """
    try:
        with whole_file(path, durable=True) as partial, partial.open("wb") as file:
            yield file
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk is full ({error.strerror}) while {path} was written. Finished blocks are kept: make room and "
            "make the same call again, it goes on behind them"
        ) from error


def copy_file(old: Path, new: Path) -> None:
    """Copies a file's content."""
    with old.open("rb") as source, writing(new) as file:
        shutil.copyfileobj(source, file)


def remove_folder(folder: Path) -> None:
    """Removes a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def sizes(*paths: Path) -> dict[str, int]:
    """The bytes of those files that are there, by name."""
    return {path.name: path.stat().st_size for path in paths if path.is_file()}
