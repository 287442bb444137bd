"""MaskSet: the masks of a model, one bit per weight at rest."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_callbacks.sparsity.matching import Parameters
from prune_callbacks.sparsity.patterns import Pattern
from prune_callbacks.writing import whole_file

METADATA = "prune_callbacks.masks"
"""The key under which a masks file has its shapes."""

NamedTensors = Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]


def _pack(keep: Bool[Tensor, "..."]) -> UInt8[Tensor, " bytes"]:
    return torch.from_numpy(np.packbits(keep.detach().cpu().numpy(), axis=None))


def _items(named: NamedTensors) -> dict[str, Tensor]:
    return dict(named.items() if isinstance(named, Mapping) else named)


class MaskSet(Mapping[str, Tensor]):
    """
    An immutable mapping from parameter name to keep mask, True = kept.

    Masks have the shape of their parameter and are stored packed, one bit per weight; `masks[name]` unpacks
    one into a new bool tensor on the CPU. Names are those of the model that was pruned. Methods that take
    named parameters also accept those of a module that *contains* that model (a LightningModule, a DDP
    wrapper), whose names carry one common prefix, and those of
    layers that a wrapper (an adapter) holds under a further name.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, keep in masks.items():
            if keep.dtype != torch.bool:
                raise ValueError(f"mask {name!r} must be a bool tensor with True = kept, got {keep.dtype}")
        self._bits = {name: _pack(keep) for name, keep in masks.items()}
        self._shapes = {name: tuple(keep.shape) for name, keep in masks.items()}

    @classmethod
    def join(cls, parts: Iterable["MaskSet"]) -> "MaskSet":
        """One set of the masks of several, whose names must differ; nothing is unpacked."""
        joined = cls({})
        for part in parts:
            shared = joined.keys() & part.keys()
            if shared:
                raise ValueError(f"mask {min(shared)!r} is in more than one of the sets")
            joined._bits |= part._bits
            joined._shapes |= part._shapes
        return joined

    @classmethod
    def from_nonzero(cls, named_parameters: NamedTensors) -> "MaskSet":
        """The masks of an already sparse model: kept is what is not zero, for every tensor given."""
        return cls.join(cls({name: tensor.detach() != 0}) for name, tensor in _items(named_parameters).items())

    @classmethod
    def all_kept(cls, shapes: Mapping[str, Sequence[int]]) -> "MaskSet":
        """Masks of these shapes that remove nothing."""
        return cls.join(cls({name: torch.ones(*shape, dtype=torch.bool)}) for name, shape in shapes.items())

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        shape = self._shapes[name]
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.unpackbits(self._bits[name].numpy(), count=count)
        return torch.from_numpy(flat.view(np.bool_)).view(shape)

    def packed(self, name: str) -> UInt8[Tensor, " bytes"]:
        """The mask of a parameter, flattened and packed: eight weights a byte, the first in the highest bit."""
        return self._bits[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter's mask."""
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._shapes == other._shapes and all(torch.equal(self._bits[n], other._bits[n]) for n in self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} masks, sparsity {self.sparsity():.4f})"

    def __and__(self, other: "MaskSet") -> "MaskSet":
        """Kept in both; a name that only one of the two has keeps that one's mask."""
        merged = MaskSet({})
        merged._bits = {**other._bits, **self._bits}
        merged._shapes = {**other._shapes, **self._shapes}
        for name in self.keys() & other.keys():
            if self._shapes[name] != other._shapes[name]:
                raise ValueError(f"mask {name!r} has shape {self._shapes[name]} here and {other._shapes[name]} there")
            merged._bits[name] = self._bits[name] & other._bits[name]
        return merged

    def sparsity(self) -> float:
        """The fraction removed over all masks, in [0, 1]; 0 for an empty set."""
        total = sum(int(np.prod(shape, dtype=np.int64)) for shape in self._shapes.values())
        return 1 - sum(self._kept(name) for name in self) / total if total else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """The fraction removed of every parameter, by name."""
        return {n: 1 - self._kept(n) / max(1, int(np.prod(self._shapes[n], dtype=np.int64))) for n in self}

    def _kept(self, name: str) -> int:
        return int(np.unpackbits(self._bits[name].numpy()).sum(dtype=np.int64))

    def matching(self, named_parameters: NamedTensors) -> dict[str, Tensor]:
        """
        Returns the parameters that these masks are for, by mask name.

        Of a module with several models that the masks fit (a student and a frozen teacher), those of the only one that
        is trained.

        Raises:
            ValueError: a mask has no parameter, or one of another shape; the first mismatches are listed. Or the masks
                fit several models, and not exactly one is trained.
        """
        parameters = _items(named_parameters)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        places = self.places(shapes, {name for name, parameter in parameters.items() if parameter.requires_grad})
        return {name: parameters[place] for name, place in places.items()}

    def fits(self, named_parameters: NamedTensors) -> bool:
        """Returns whether every mask has a parameter of exactly its name and shape, but for wrapped layers."""
        known = Parameters({name: parameter.shape for name, parameter in _items(named_parameters).items()})
        return all(known.find(name, shape) is not None for name, shape in self._shapes.items())

    def places(self, shapes: Mapping[str, Sequence[int]], trained: Collection[str] = ()) -> dict[str, str]:
        """
        Returns the names of the parameters that these masks are for, by mask name; see `matching`.

        Args:
            shapes: of a module's parameters, whole, by name.
            trained: the names of those that are trained.

        Raises:
            ValueError: see `matching`.
        """
        known = Parameters(shapes)
        prefix = known.prefix(self._shapes, trained)
        found = {name: known.find(prefix + name, shape) for name, shape in self._shapes.items()}
        places = {name: place for name, place in found.items() if place is not None}
        problems = [f"{name}: no such parameter" for name in self if name not in places]
        problems += [
            f"{name}: mask of shape {self._shapes[name]}, parameter of shape {known.shapes[place]}"
            for name, place in places.items()
            if known.shapes[place] != self._shapes[name]
        ]
        if problems:
            raise ValueError(
                f"these masks belong to another model: {len(problems)} of {len(self)} do not fit, first "
                + "; ".join(problems[:3])
                + f". The model has {len(shapes)} parameters, first {', '.join(list(shapes)[:3])}."
            )
        return places

    @torch.no_grad()
    def apply_(self, named_parameters: NamedTensors) -> None:
        """Sets every pruned weight to zero, in place."""
        for name, parameter in self.matching(named_parameters).items():
            parameter.masked_fill_(~self[name].to(parameter.device), 0)

    @torch.no_grad()
    def violations(self, named_parameters: NamedTensors) -> dict[str, int]:
        """How many pruned weights are not zero, for every parameter that has any; {} when the masks hold."""
        counts = {
            name: int(parameter.masked_fill(self[name].to(parameter.device), 0).count_nonzero())
            for name, parameter in self.matching(named_parameters).items()
        }
        return {name: count for name, count in counts.items() if count}

    def check(self, pattern: Pattern, *, input_first: Collection[str] = ()) -> None:
        """
        Raises ValueError naming the masks that do not have `pattern`.

        Of experts in one parameter, (experts, out, in), each matrix must have it, or be kept whole: not every expert
        need be a target.

        Args:
            pattern: what every mask must have.
            input_first: names of masks stored as (in, out), those of GPT-2's `Conv1D`; of experts (experts, in, out).
        """
        wrong = [name for name in self if not self._has(name, pattern, name in input_first)]
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(self)} masks do not have {pattern}: {', '.join(wrong[:3])}")

    def _has(self, name: str, pattern: Pattern, input_first: bool) -> bool:
        keep = self[name].mT if input_first and len(self._shapes[name]) > 1 else self[name]
        if keep.ndim == 3:
            return not keep.all() and all(bool(matrix.all()) or pattern.holds(matrix) for matrix in keep)
        return keep.ndim == 2 and pattern.holds(keep)

    def state_dict(self) -> dict[str, Any]:
        """Packed masks and shapes as plain values that `torch.load(weights_only=True)` accepts."""
        return {"bits": dict(self._bits), "shapes": {name: list(shape) for name, shape in self._shapes.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "MaskSet":
        """The inverse of `state_dict`."""
        masks = cls({})
        masks._bits = {name: bits.cpu() for name, bits in state["bits"].items()}
        masks._shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        return masks

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: one bit per weight, the shapes in its metadata."""
        # One key: safetensors writes several in any order, and equal masks are to be equal files.
        with whole_file(path) as partial:
            save_file(self._bits, partial, metadata={METADATA: json.dumps(self._shapes)})

    @classmethod
    def load(cls, path: str | Path) -> "MaskSet":
        """
        Reads what `save` wrote.

        Raises:
            ValueError: the file is missing, damaged, or not a masks file.
        """
        if not Path(path).is_file():
            raise ValueError(f"no masks file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        if METADATA not in metadata:
            raise ValueError(f"{path} is a safetensors file but not one that MaskSet.save wrote")
        shapes = json.loads(metadata[METADATA])
        return cls.from_state_dict({"bits": {name: bits[name] for name in shapes}, "shapes": shapes})
