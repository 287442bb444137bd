"""Which file of the target a weight goes into: one file for every block, and one for what is outside of them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from prune_callbacks.sparsity import MaskSet
from prune_callbacks.sparsity.masks import METADATA
from prune_callbacks.streaming.files import DTYPES, Pieces, whole, write_tensors
from prune_callbacks.streaming.source import Checkpoint

FORMAT = {"format": "pt"}
"""Without it transformers does not read a file."""


class Shards:
    """
    The weights of a model, shared out over files.

    Args:
        model: its weights are on the meta device.
        blocks: names of its decoder blocks.
        places: the checkpoint's name of every weight.

    Attributes:
        of_block: for every block its weights' names in the checkpoint, by name.
        outside: the same for everything else.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], places: Mapping[str, str]) -> None:
        self.of_block = [{n: key for n, key in places.items() if n.startswith(f"{block}.")} for block in blocks]
        inside = {name for part in self.of_block for name in part}
        self.outside = {name: key for name, key in places.items() if name not in inside}
        state = model.state_dict()
        self.like = {name: (state[name].dtype, tuple(state[name].shape)) for name in places}

    def file(self, index: int) -> str:
        """The name of a block's file; that of the rest comes behind all blocks."""
        return f"model-{index + 1:05d}-of-{len(self.of_block) + 1:05d}.safetensors"

    @property
    def nbytes(self) -> int:
        """What all weights take."""
        return sum(Pieces(*self.like[name], lambda: iter(())).nbytes for name in self.like)

    def copy(self, names: Mapping[str, str], checkpoint: Checkpoint, path: Path) -> None:
        """Writes weights as they are, but for the dtype, a piece at a time."""

        def pieces(name: str, key: str) -> Pieces:
            dtype, shape = self.like[name]
            return Pieces(dtype, shape, lambda: (piece.to(dtype) for piece in checkpoint.pieces(key)))

        write_tensors(path, {name: pieces(name, key) for name, key in names.items()}, FORMAT)

    def index(self) -> dict[str, Any]:
        """What `model.safetensors.index.json` holds."""
        parts = [*self.of_block, self.outside]
        places = {name: self.file(index) for index, part in enumerate(parts) for name in part}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(places.items()))}


def masks_in_pieces(masks: MaskSet) -> tuple[dict[str, Pieces], dict[str, str]]:
    """The tensors and the metadata of a file that `MaskSet.load` reads."""
    shapes = {name: list(masks.shape(name)) for name in masks}
    return {name: whole(masks.packed(name)) for name in masks}, {METADATA: json.dumps(shapes)}


def join_files(parts: Iterable[Path], path: Path) -> None:
    """One safetensors file of the tensors of several, of which one is held at a time; of masks the shapes too."""
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
