"""Distributes the weights over the files of the target: one file per block, and one for all other weights."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from prune_callbacks.sparsity import MaskSet
from prune_callbacks.sparsity.masks import METADATA
from prune_callbacks.storage.model_parts import file_names
from prune_callbacks.streaming.files import DTYPES, Pieces, whole, write_tensors
from prune_callbacks.streaming.places import Place, as_saved
from prune_callbacks.streaming.source import CheckpointFolder

FORMAT = {"format": "pt"}
"""Metadata without which transformers does not read a file."""


class Shards:
    """
    The distribution of a model's weights over files.

    Args:
        model: the model, with its weights on the meta device.
        blocks: names of its decoder blocks.
        places: the source of every weight; see `find_places`.

    Attributes:
        of_block: for every block, the sources of its weights by name.
        outside: names in the checkpoint of all other weights, which are copied, by name in the model.
        nbytes: bytes of all weights in the model's dtype.

    Raises:
        ValueError: a weight outside of the blocks is made by a conversion when it is loaded.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str], places: Mapping[str, Place]) -> None:
        self.model = model
        self.of_block = [{n: place for n, place in places.items() if n.startswith(f"{block}.")} for block in blocks]
        inside = {name for part in self.of_block for name in part}
        self.outside: dict[str, str] = {}
        for name, place in places.items():
            if name not in inside:
                if not isinstance(place, str):
                    raise ValueError(
                        f"{name}, outside of the decoder blocks, is made of {place.keys[0][1]} and others when it is "
                        "loaded, which is supported in the blocks only. Load the model once on a machine with enough "
                        "memory, save it with save_pretrained(folder, save_original_format=False), and name that folder"
                    )
                self.outside[name] = place
        state = model.state_dict()
        self.nbytes = sum(state[name].nbytes for name in places)

    def file(self, index: int) -> str:
        """Returns the file name of a block; the index after the last block stands for all other weights."""
        return self.files()[index]

    def files(self) -> list[str]:
        """Returns the names of all files."""
        return file_names(len(self.of_block) + 1)

    def write_block(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Writes the weights of a block, given by their names in the model, as `save_pretrained` would."""
        here = {name: weight.cpu() for name, weight in weights.items()}  # as_saved copies experts: not on a GPU
        write_tensors(path, {name: whole(weight) for name, weight in as_saved(self.model, here).items()}, FORMAT)

    def copy_outside(self, checkpoint: CheckpointFolder, path: Path) -> None:
        """Copies the weights outside of the blocks, cast to the model's dtype, one piece at a time."""
        state = self.model.state_dict()

        def pieces(name: str, key: str) -> Pieces:
            dtype = state[name].dtype
            return Pieces(
                dtype, tuple(state[name].shape), lambda: (piece.to(dtype) for piece in checkpoint.pieces(key))
            )

        written = {name: next(iter(as_saved(self.model, {name: state[name]}))) for name in self.outside}
        write_tensors(path, {written[name]: pieces(name, key) for name, key in self.outside.items()}, FORMAT)


def masks_in_pieces(masks: MaskSet) -> tuple[dict[str, Pieces], dict[str, str]]:
    """Returns the tensors and the metadata of a file that `MaskSet.load` reads."""
    shapes = {name: list(masks.shape(name)) for name in masks}
    return {name: whole(masks.packed(name)) for name in masks}, {METADATA: json.dumps(shapes)}


def join_files(parts: Iterable[Path], path: Path) -> None:
    """Joins safetensors files into one, with one tensor in memory at a time; merges the shapes in files of masks."""
    tensors: dict[str, Pieces] = {}
    shapes: dict[str, Any] = {}
    for part in parts:
        with safe_open(part, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                like = file.get_slice(name)
                tensors[name] = Pieces(DTYPES[like.get_dtype()], tuple(like.get_shape()), _reader(part, name))
            shapes |= json.loads((file.metadata() or {}).get(METADATA, "{}"))
    write_tensors(path, tensors, {METADATA: json.dumps(shapes)} if shapes else {})


def _reader(path: Path, name: str) -> Any:
    def read() -> Iterator[Tensor]:
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor(name)

    return read
