"""What a compressed file says of itself: how its tensors are packed, and the bytes of every part."""

import json
import math
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

FILE = "compressed.safetensors"
METADATA = "prune_callbacks.compressed"
"""The key under which a compressed file says how its tensors are packed."""

ROLES = ("values", "indices", "scales")
"""What the parts of a packed weight are called in the file: NAME.values and so on."""


@dataclass(frozen=True)
class Compression:
    """
    The bytes of a file of weights, counted in the file itself.

    Attributes:
        packed_weights: how many weights the packed layers have, zeros included.
        dense_bytes: what these take in their own dtype.
        value_bytes: of kept values or codes.
        index_bytes: of masks or places.
        scale_bytes: of scales.
        other_bytes: of all tensors that are not packed (embeddings, norms, biases, layers that were left dense).
        header_bytes: of names, shapes and metadata.
        file_bytes: of the file, the sum of the last five.
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
        """Bytes of the packed layers over what they take dense."""
        return self._packed_bytes / self.dense_bytes

    @property
    def effective_bits(self) -> float:
        """Bits a weight of the packed layers, with those of the mask and the scales."""
        return 8 * self._packed_bytes / self.packed_weights

    @property
    def file_ratio(self) -> float:
        """Bytes of the file over those of all its tensors dense."""
        return self.file_bytes / (self.dense_bytes + self.other_bytes)

    @property
    def _packed_bytes(self) -> int:
        return self.value_bytes + self.index_bytes + self.scale_bytes

    def __str__(self) -> str:
        return (
            f"{self.effective_bits:.2f} bits a weight in the packed layers, {self.ratio:.3f} of what they take dense; "
            f"the file has {self.file_bytes / 1e6:.1f} MB, {self.file_ratio:.3f} of dense"
        )

    def record(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self) | {
            "effective_bits": self.effective_bits,
            "packed_over_dense": self.ratio,
            "file_over_dense": self.file_ratio,
        }


def packed_layout(path: Path) -> dict[str, dict[str, Any]]:
    """
    Reads how the tensors of a compressed file are packed, by name.

    Raises:
        ValueError: there is no such file, or it is damaged.
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
    Counts the bytes of what `save_compressed` wrote, from the header of the file: masks, places and scales included.

    Raises:
        ValueError: there is no such file, or it is damaged.
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
