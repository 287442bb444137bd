"""Target: one matrix to prune, in any kind of module."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prune_callbacks.anatomy.computed import why_no_parameter
from prune_callbacks.anatomy.memory import in_memory

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
    input_first: bool

    shares_parameter: ClassVar[bool]
    """Whether the parameter also holds other matrices, those of other experts."""

    unseen: ClassVar[str]
    """The reason why calibration may have seen no inputs, as a clause for a message."""

    @property
    def parameter(self) -> nn.Parameter:
        """Returns the current parameter; moving the module replaces its data by another tensor."""
        return self.module.get_parameter(self.attribute)

    @property
    @abstractmethod
    def parameter_name(self) -> str:
        """Returns the parameter's full name, as in the model's `state_dict`."""

    @property
    @abstractmethod
    def stored_name(self) -> str:
        """Returns the matrix's name in reports: the parameter's name, plus the index of an expert."""

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """Returns a detached view of the matrix in its stored layout; writing to it changes the parameter."""

    @property
    @abstractmethod
    def identity(self) -> tuple[object, ...]:
        """Returns a key that is equal for two targets with the same matrix: tied weights, or views of one memory."""

    @property
    def why_no_parameter(self) -> str | None:
        """Returns why the layer's weight is no parameter that can be pruned, and how it becomes one; None if it is."""
        return why_no_parameter(self.module, self.attribute)

    def matrix(self) -> Float[Tensor, "out in"]:
        """Returns the matrix as (out, in), a view of the parameter."""
        return self.oriented(self.stored)

    @torch.no_grad()
    def assign_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Overwrites the matrix in place with one of shape (out, in)."""
        self.stored.copy_(self.oriented(matrix))

    def oriented(self, tensor: Tensor) -> Tensor:
        """Returns a view of a weight or mask, converted from the stored layout to (out, in), or back."""
        return tensor.T if self.input_first else tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (out, in)."""
        out, size = self.oriented(self.stored).shape
        return out, size


class LayerTarget(Target):
    """The weight of a linear layer (`LINEAR`)."""

    shares_parameter = False
    unseen = "its forward was never called"

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> "LayerTarget":
        """Makes the target of a linear layer with full name `name`."""
        return cls(name, layer, "weight", isinstance(layer, Conv1D))

    @property
    def parameter_name(self) -> str:
        return f"{self.name}.{self.attribute}"

    @property
    def stored_name(self) -> str:
        return self.parameter_name

    @property
    def stored(self) -> Tensor:
        return self.parameter.detach()

    @property
    def identity(self) -> tuple[object, ...]:
        if self.why_no_parameter is not None:
            return id(self.module), self.attribute
        return _place(self) or (id(self.parameter), 0)

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
        index: the expert's index. The parameter has shape (experts, out, in), or (experts, in, out).
    """

    index: int

    shares_parameter = True
    unseen = "no product with it was seen"

    @property
    def parameter_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def stored_name(self) -> str:
        return self.name

    @property
    def stored(self) -> Tensor:
        return self.parameter.detach()[self.index]

    @property
    def identity(self) -> tuple[object, ...]:
        return _place(self) or (id(self.parameter), self.index)


def _place(target: Target) -> tuple[object, ...]:
    """Returns where a matrix lies in memory; () if it does not lie there as it is."""
    if not in_memory(target.parameter):
        return ()
    stored = target.stored
    return stored.data_ptr(), stored.shape, stored.stride()
