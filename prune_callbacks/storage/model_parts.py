"""Writes the weights of a model into a folder one part after another, with an index for `from_pretrained`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from prune_callbacks.anatomy.adapters import base_state_dict
from prune_callbacks.storage.model_folder import PLAIN
from prune_callbacks.writing import rename

INDEX = "model.safetensors.index.json"

PART_BYTES = 2**28
"""Bytes up to which blocks are written together, so that a small model is one file."""


def parts_of(sizes: Mapping[str, int], blocks: Iterable[str], most: int = PART_BYTES) -> list[list[str]]:
    """
    Divides the names of a model's weights into parts that are gathered and written one after another.

    Args:
        sizes: the bytes of every whole weight, by name.
        blocks: the names of the decoder blocks, which are not divided; all other weights together are one more.
        most: neighbouring blocks are joined as long as the part has no more bytes than this.
    """
    prefixes = [f"{block}." for block in blocks]
    pieces: list[list[str]] = [[] for _ in range(len(prefixes) + 1)]
    for name in sizes:
        pieces[next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), len(prefixes))].append(name)
    parts: list[list[str]] = []
    filled = 0
    for piece in pieces:
        added = sum(sizes[name] for name in piece)
        if not parts or filled + added > most:
            parts.append([])
            filled = 0
        parts[-1] += piece
        filled += added
    return [part for part in parts if part]


def file_names(count: int) -> list[str]:
    """Returns the names of the files of so many parts, as `save_pretrained` names them."""
    several = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    return several if count > 1 else [PLAIN]


def write_part(model: PreTrainedModel, state: Mapping[str, Tensor], path: Path) -> None:
    """
    Writes some of a model's weights as `save_pretrained` would, without adapters, and its configuration beside them.

    Args:
        model: the model; its own weights may be sharded.
        state: whole weights, by their names in its `state_dict`.
        path: the file.
    """
    with TemporaryDirectory(dir=path.parent) as inner:
        model.save_pretrained(inner, state_dict=base_state_dict(model, state), max_shard_size="100TB")
        for file in sorted(Path(inner).iterdir()):
            rename(file, path if file.name == PLAIN else path.with_name(file.name))


def index_of(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """Returns the index of the tensors in safetensors files of a folder, the content of the file `INDEX`."""
    weight_map: dict[str, str] = {}
    total = 0
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                weight_map[key] = name
                total += file.get_tensor(key).nbytes  # mapped, not read
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
