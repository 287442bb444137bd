"""Target: one matrix to prune, in any kind of module."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prune_callbacks.anatomy.computed import why_no_parameter
from prune_callbacks.anatomy.memory import in_memory
from prune_callbacks.parallel.shapes import whole_shape

LINEAR = (nn.Linear, Conv1D)
"""Types of modules whose weight is a target. `Conv1D` is GPT-2's linear layer, with a weight of shape (in, out)."""


@dataclass(frozen=True)
class Target(ABC):
    """
    One matrix to prune: its location, its layout, and methods to read and replace it.

    Attributes:
        name: full dotted name, which `targets=` matches and errors mention.
        module: the module with the parameter.
        attribute: the parameter's name in the module.
        input_first: whether the matrix is stored as (in, out).
    """

    name: str
    module: nn.Module
    attribute: str
    input_first: bool = False

    routed: ClassVar[bool] = False
    """Whether a router decides which tokens reach the matrix."""

    seen_by: ClassVar[Literal["call", "expert", "attention", "never"]] = "call"
    """How calibration sees the inputs: of the module, of products in a module of experts, of an attention, or never."""

    unseen: ClassVar[str] = "its forward was never called"
    """The reason why calibration may have seen no inputs, as a clause for a message."""

    convolution: ClassVar[bool] = False
    """Whether the matrix is a convolution's, whose input vectors are patches and not tokens."""

    depthwise: ClassVar[bool] = False
    """Whether the matrix is a convolution's in which every output channel reads a single input channel."""

    @property
    def parts(self) -> int:
        """Returns how many targets the parameter holds."""
        return 1

    @property
    def groups(self) -> int:
        """Returns how many matrices of one shape stand below each other, each with input features of its own."""
        return 1

    @property
    def parameter(self) -> nn.Parameter:
        """Returns the current parameter; moving the module replaces its data by another tensor."""
        return self.module.get_parameter(self.attribute)

    @property
    @abstractmethod
    def parameter_name(self) -> str:
        """Returns the parameter's full name, as in the model's `state_dict`."""

    @property
    def layer(self) -> str:
        """Returns the full name of the layer, which may have several targets."""
        return self.parameter_name.rpartition(".")[0]

    @property
    def stored_name(self) -> str:
        """Returns the matrix's name in reports: the parameter's name, and for a part of it the part's."""
        return self.parameter_name

    @property
    def stored(self) -> Tensor:
        """Returns a detached view of the matrix in its stored layout; writing to it changes the parameter."""
        return self.part_of(self.parameter.detach())

    def part_of(self, whole: Tensor) -> Tensor:
        """Returns the view of this matrix, in its stored layout, in a tensor of the parameter's shape."""
        return whole

    @property
    def identity(self) -> tuple[object, ...]:
        """Returns a key that is equal for two targets with the same matrix: tied weights, or views of one memory."""
        if self.why_no_parameter is not None:
            return id(self.module), self.attribute
        return _place(self) or (id(self.parameter), self._part)

    @property
    def _part(self) -> int:
        """Returns which part of the parameter the matrix is."""
        return 0

    @property
    def run(self) -> int:
        """Returns how many neighbouring columns, from the first on, belong to one place of the input."""
        return self.shape[1]

    def by_channel(self) -> "Target":
        """Returns the target with its columns ordered so that neighbours are neighbouring input channels."""
        return self

    @property
    def why_no_parameter(self) -> str | None:
        """Returns why the layer's weight is no parameter that can be pruned, and how it becomes one; None if it is."""
        return why_no_parameter(self.module, self.attribute)

    @property
    def reading(self) -> Hashable:
        """Returns a key: layers with the same input tensor and an equal key have the same input features."""
        return None

    def vectors(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the input vectors that the layer makes of its input, (..., groups * in), in parts."""
        yield x

    def matrix(self) -> Float[Tensor, "out in"]:
        """Returns the matrix as (out, in), a view of the parameter where its layout allows one."""
        return self.oriented(self.stored)

    @torch.no_grad()
    def assign_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Overwrites the matrix in place with one of shape (out, in)."""
        self.stored.copy_(self.as_stored(matrix))

    def oriented(self, stored: Tensor) -> Tensor:
        """Converts a weight or mask from the stored layout to (out, in)."""
        return stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Converts a weight or mask from (out, in) to the stored layout."""
        return matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (out, in); `in` counts the input features of one group."""
        out, size = self.oriented(self.stored).shape
        return out, size


@dataclass(frozen=True)
class LayerTarget(Target):
    """The weight of a linear layer (`LINEAR`)."""

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> "LayerTarget":
        """Makes the target of a linear layer with full name `name`."""
        return cls(name, layer, "weight", isinstance(layer, Conv1D))

    @property
    def parameter_name(self) -> str:
        return f"{self.name}.{self.attribute}"

    def oriented(self, stored: Tensor) -> Tensor:
        return stored.T if self.input_first else stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.input_first else matrix

    @property
    def shape(self) -> tuple[int, int]:
        if self.why_no_parameter is None:
            return super().shape
        sizes = ("nf", "nx") if self.input_first else ("out_features", "in_features")
        out, size = (getattr(self.module, name) for name in sizes)
        return out, size


@dataclass(frozen=True)
class ExpertTarget(Target):
    """
    One expert's matrix: a slice of the parameter with the matrices of all experts.

    Its name is that of the parameter with the expert's index: `model.layers.0.mlp.experts.gate_up_proj.3`.

    Attributes:
        input_first: whether the parameter has shape (experts, in, out) in place of (experts, out, in).
        index: the expert's index.
    """

    index: int = 0

    @property
    def _part(self) -> int:
        return self.index

    routed = True
    seen_by = "expert"
    unseen = "no product with it was seen"

    @property
    def parameter_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def parts(self) -> int:
        return int(whole_shape(self.parameter)[0])

    @property
    def stored_name(self) -> str:
        return self.name

    def part_of(self, whole: Tensor) -> Tensor:
        return whole[self.index]

    def oriented(self, stored: Tensor) -> Tensor:
        return stored.T if self.input_first else stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.input_first else matrix


def _place(target: Target) -> tuple[object, ...]:
    """Returns where a matrix lies in memory; () if it does not lie there as it is."""
    if not in_memory(target.parameter):
        return ()
    stored = target.stored
    return stored.data_ptr(), stored.shape, stored.stride()
