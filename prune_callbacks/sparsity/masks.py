"""MaskSet: the masks of a model, stored at one bit per weight."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_callbacks.sparsity.layouts import has_pattern, matrices
from prune_callbacks.sparsity.parameter_names import Parameters
from prune_callbacks.sparsity.patterns import Pattern
from prune_callbacks.writing import whole_file

METADATA = "prune_callbacks.masks"
"""The metadata key of the shapes in a masks file."""
NONE: Mapping[str, int] = MappingProxyType({})
NamedTensors = Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]


def _pack(keep: Bool[Tensor, "..."]) -> UInt8[Tensor, " bytes"]:
    return torch.from_numpy(np.packbits(keep.detach().cpu().numpy(), axis=None))


def _items(named: NamedTensors) -> dict[str, Tensor]:
    return dict(named.items() if isinstance(named, Mapping) else named)


class MaskSet(Mapping[str, Tensor]):
    """
    An immutable mapping from parameter name to keep mask, True = kept.

    A mask has the shape of its parameter and is stored packed, one bit per weight; `masks[name]` unpacks it into a new
    bool tensor on the CPU. Names are those of the model that was pruned. Methods that take named parameters also accept
    those of a module that *contains* this model (a LightningModule, a DDP wrapper), with one prefix common to all
    names, and those of wrapped layers (adapters), with one more part in their names. The constructor raises ValueError
    for a mask that is not a bool tensor.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, keep in masks.items():
            if keep.dtype != torch.bool:
                raise ValueError(f"mask {name!r} must be a bool tensor with True = kept, got {keep.dtype}")
        self._bits = {name: _pack(keep) for name, keep in masks.items()}
        self._shapes = {name: tuple(keep.shape) for name, keep in masks.items()}

    @classmethod
    def join(cls, parts: Iterable["MaskSet"]) -> "MaskSet":
        """Returns the union of several sets, without unpacking; raises ValueError for a name in more than one."""
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
        """Returns the masks of an already sparse model: nonzero weights are kept, in every given tensor."""
        return cls.join(cls({name: tensor.detach() != 0}) for name, tensor in _items(named_parameters).items())

    @classmethod
    def all_kept(cls, shapes: Mapping[str, Sequence[int]]) -> "MaskSet":
        """Returns masks of these shapes that keep every weight."""
        return cls.join(cls({name: torch.ones(*shape, dtype=torch.bool)}) for name, shape in shapes.items())

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        shape = self._shapes[name]
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.unpackbits(self._bits[name].numpy(), count=count)
        return torch.from_numpy(flat.view(np.bool_)).view(shape)

    def packed(self, name: str) -> UInt8[Tensor, " bytes"]:
        """Returns a parameter's mask flattened and packed: eight weights per byte, the first in the highest bit."""
        return self._bits[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter's mask."""
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
        """Returns the masks of weights kept in both sets; a name that only one set has keeps its mask."""
        merged = MaskSet({})
        merged._bits = {**other._bits, **self._bits}
        merged._shapes = {**other._shapes, **self._shapes}
        for name in self.keys() & other.keys():
            if self._shapes[name] != other._shapes[name]:
                raise ValueError(f"mask {name!r} has shape {self._shapes[name]} here and {other._shapes[name]} there")
            merged._bits[name] = self._bits[name] & other._bits[name]
        return merged

    def sparsity(self) -> float:
        """Returns the fraction of weights removed over all masks, in [0, 1]; 0 for an empty set."""
        total = sum(int(np.prod(shape, dtype=np.int64)) for shape in self._shapes.values())
        return 1 - sum(self._kept(name) for name in self) / total if total else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Returns the fraction of weights removed from every parameter, by name."""
        return {n: 1 - self._kept(n) / max(1, int(np.prod(self._shapes[n], dtype=np.int64))) for n in self}

    def _kept(self, name: str) -> int:
        return int(np.unpackbits(self._bits[name].numpy()).sum(dtype=np.int64))

    def matching(self, named_parameters: NamedTensors) -> dict[str, Tensor]:
        """
        Returns the parameter of every mask, by mask name.

        If the masks fit several models of a module (a student and a frozen teacher), the parameters of the only trained
        one are returned.

        Raises:
            ValueError: a mask has no parameter, or one of another shape; the first mismatches are listed. Or the masks
                fit several models, of which not exactly one is trained.
        """
        parameters = _items(named_parameters)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        places = self.places(shapes, {name for name, parameter in parameters.items() if parameter.requires_grad})
        return {name: parameters[place] for name, place in places.items()}

    def fits(self, named_parameters: NamedTensors) -> bool:
        """Returns whether every mask has a parameter of its shape under its name, or under that of a wrapped layer."""
        known = Parameters({name: parameter.shape for name, parameter in _items(named_parameters).items()})
        return len(known.find_all(self._shapes)) == len(self)

    def places(self, shapes: Mapping[str, Sequence[int]], trained: Collection[str] = ()) -> dict[str, str]:
        """
        Returns the name of every mask's parameter, by mask name; see `matching`.

        Args:
            shapes: the unsharded shapes of a module's parameters, by name.
            trained: the names of the trained parameters.

        Raises:
            ValueError: see `matching`.
        """
        known = Parameters(shapes)
        prefix = known.prefix(self._shapes, trained)
        places = known.find_all(self._shapes, prefix)
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
        """Zeroes every pruned weight, in place; raises ValueError as `matching` does."""
        for name, parameter in self.matching(named_parameters).items():
            parameter.detach().masked_fill_(~self[name].to(parameter.device), 0)  # it may be an inference tensor

    @torch.no_grad()
    def violations(self, named_parameters: NamedTensors) -> dict[str, int]:
        """Counts the pruned weights that are not zero, by parameter; {} if there are none."""
        counts = {
            name: int(parameter.masked_fill(self[name].to(parameter.device), 0).count_nonzero())
            for name, parameter in self.matching(named_parameters).items()
        }
        return {name: count for name, count in counts.items() if count}

    def check(
        self, pattern: Pattern, *, input_first: Collection[str] = (), convolutions: Mapping[str, int] = NONE
    ) -> None:
        """
        Raises ValueError naming the masks that do not have `pattern`.

        In a parameter of several experts, (experts, out, in), each matrix must have the pattern or be kept completely,
        because not every expert need be a target.

        Args:
            pattern: the pattern that every mask must have.
            input_first: names of masks stored as (in, out), as for GPT-2's `Conv1D`, or (experts, in, out).
            convolutions: names of masks of convolutions, (out, in / groups, ...), with the number of groups. N:M is
                checked along the input channels. Masks of four dimensions and more are those of convolutions anyway.
        """
        groups = {name: convolutions.get(name, 1 if len(shape) > 3 else 0) for name, shape in self._shapes.items()}
        wrong = [n for n in self if not has_pattern(matrices(self[n], pattern, n in input_first, groups[n]), pattern)]
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(self)} masks do not have {pattern}: {', '.join(wrong[:3])}")

    def state_dict(self) -> dict[str, Any]:
        """Returns packed masks and shapes as plain values that `torch.load(weights_only=True)` accepts."""
        return {"bits": dict(self._bits), "shapes": {name: list(shape) for name, shape in self._shapes.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "MaskSet":
        """Returns the set whose `state_dict` is `state`."""
        masks = cls({})
        masks._bits = {name: bits.cpu() for name, bits in state["bits"].items()}
        masks._shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        return masks

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with one bit per weight and the shapes in its metadata; see `whole_file`."""
        # One metadata key: safetensors orders several at random, and equal masks must give equal files.
        with whole_file(path) as partial:
            save_file(self._bits, partial, metadata={METADATA: json.dumps(self._shapes)})

    @classmethod
    def load(cls, path: str | Path) -> "MaskSet":
        """
        Reads a file that `save` wrote.

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
