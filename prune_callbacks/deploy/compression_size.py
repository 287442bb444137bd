"""Reads from the header of a compressed file how its tensors are packed, and the bytes of every part."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prune_callbacks.results import Result

FILE = "compressed.safetensors"
METADATA = "prune_callbacks.compressed"
"""The metadata key for the layout of the packed tensors."""

ROLES = ("values", "indices", "scales")
"""Suffixes of the parts of a packed weight in the file: NAME.values and so on."""


@dataclass(frozen=True)
class Compression(Result):
    """
    The bytes of a compressed file by part, counted in the file itself.

    Attributes:
        packed_weights: number of weights in the packed layers, zeros included.
        dense_bytes: bytes of these weights when they are stored dense in their own dtype.
        value_bytes: bytes of kept values or integer codes.
        index_bytes: bytes of masks or positions in groups.
        scale_bytes: bytes of quantization scales.
        other_bytes: bytes of all tensors that are not packed (embeddings, norms, biases, layers that stay dense).
        header_bytes: bytes of names, shapes and metadata.
        file_bytes: bytes of the file, the sum of the last five.
    """

    packed_weights: int
    dense_bytes: int
    value_bytes: int
    index_bytes: int
    scale_bytes: int
    other_bytes: int
    header_bytes: int
    file_bytes: int

    @property
    def ratio(self) -> float:
        """Returns the bytes of the packed layers over their bytes when stored dense."""
        return self._packed_bytes / self.dense_bytes

    @property
    def effective_bits(self) -> float:
        """Returns the bits per weight of the packed layers, including masks and scales."""
        return 8 * self._packed_bytes / self.packed_weights

    @property
    def file_ratio(self) -> float:
        """Returns the bytes of the file over the bytes of all its tensors when stored dense."""
        return self.file_bytes / (self.dense_bytes + self.other_bytes)

    @property
    def _packed_bytes(self) -> int:
        return self.value_bytes + self.index_bytes + self.scale_bytes

    def __str__(self) -> str:
        return (
            f"{self.effective_bits:.2f} bits per weight in the packed layers, {self.ratio:.3f} of their dense size; "
            f"the file has {self.file_bytes / 1e6:.1f} MB, {self.file_ratio:.3f} of dense"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields and ratios as plain values, for a report."""
        return super().to_dict() | {
            "effective_bits": self.effective_bits,
            "packed_over_dense": self.ratio,
            "file_over_dense": self.file_ratio,
        }


def packed_layout(path: Path) -> dict[str, dict[str, Any]]:
    """
    Reads the layout of a compressed file: how each packed weight is stored, by parameter name.

    Raises:
        ValueError: the file does not exist, is damaged, or was not written by `save_compressed`.
    """
    if not path.is_file():
        raise ValueError(f"no compressed model in {path.parent}: {path.name} is missing; save_compressed writes it")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if METADATA not in metadata:
        raise ValueError(f"{path} is a safetensors file but not one that save_compressed wrote")
    layout: dict[str, dict[str, Any]] = json.loads(metadata[METADATA])
    return layout


def measure_compression(dirpath: str | Path) -> Compression:
    """
    Counts the bytes of a file that `save_compressed` wrote, from its header; includes masks, positions and scales.

    Args:
        dirpath: the folder with the file.

    Raises:
        ValueError: the file does not exist, is damaged, or was not written by `save_compressed`.
    """
    path = Path(dirpath) / FILE
    layout = packed_layout(path)
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(header))
    role = {f"{name}.{part}": part for name in layout for part in ROLES}
    taken = dict.fromkeys((*ROLES, "other"), 0)
    for name, entry in entries.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            taken[role.get(name, "other")] += end - begin
    weights = {name: math.prod(entry["shape"]) for name, entry in layout.items()}
    dense = sum(count * getattr(torch, layout[name]["dtype"]).itemsize for name, count in weights.items())
    return Compression(
        sum(weights.values()),
        dense,
        taken["values"],
        taken["indices"],
        taken["scales"],
        taken["other"],
        8 + header,
        path.stat().st_size,
    )
