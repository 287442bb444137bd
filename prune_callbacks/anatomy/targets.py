"""Target: one matrix to prune, whatever kind of module holds it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
"""Modules that are targets by themselves. `Conv1D` is GPT-2's Linear with a weight of shape (in, out)."""


@dataclass(frozen=True)
class Target(ABC):
    """
    One matrix to prune: where it lies, how it is stored, how it is read and replaced.

    Attributes:
        name: full dotted name, by which `targets=` chooses it and errors name it.
        module: has the parameter.
        attribute: the parameter's name in the module.
        input_first: whether the matrix is stored as (in, out).
    """

    name: str
    module: nn.Module
    attribute: str
    input_first: bool

    shares_parameter: ClassVar[bool]
    """Whether the parameter holds further matrices (other experts')."""

    unseen: ClassVar[str]
    """Why calibration may have learned nothing about the inputs, as a clause for a message."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now; its data is another tensor once the module was moved."""
        return self.module.get_parameter(self.attribute)

    @property
    @abstractmethod
    def parameter_name(self) -> str:
        """The parameter's full name, as in the model's `state_dict`."""

    @property
    @abstractmethod
    def stored_name(self) -> str:
        """The matrix's name in reports: the parameter's, with the expert's number where it holds several."""

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The matrix as it is stored, detached; changing it in place changes the parameter."""

    @property
    @abstractmethod
    def identity(self) -> tuple[int, int]:
        """Equal for two targets whose matrix is the same: weights that are tied."""

    def matrix(self) -> Float[Tensor, "out in"]:
        """Returns the matrix as (out, in), a view of the parameter."""
        return self.oriented(self.stored)

    @torch.no_grad()
    def assign_(self, matrix: Float[Tensor, "out in"]) -> None:
        """Overwrites the matrix in place with one of shape (out, in)."""
        self.stored.copy_(self.oriented(matrix))

    def oriented(self, tensor: Tensor) -> Tensor:
        """Returns a view of a weight or mask, as it is stored, as (out, in), or back: its own inverse."""
        return tensor.T if self.input_first else tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, size = self.matrix().shape
        return out, size


class LayerTarget(Target):
    """The weight of a linear layer (`LINEAR`)."""

    shares_parameter = False
    unseen = "its forward was never called"

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> "LayerTarget":
        """Makes the target of a linear layer of this full name."""
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
    def identity(self) -> tuple[int, int]:
        return id(self.parameter), 0


@dataclass(frozen=True)
class ExpertTarget(Target):
    """
    One expert's matrix, a slice of the parameter that holds those of all experts.

    Its name is the parameter's with the expert's number: `model.layers.0.mlp.experts.gate_up_proj.3`.

    Attributes:
        index: the expert. The parameter has shape (experts, out, in), or (experts, in, out).
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
    def identity(self) -> tuple[int, int]:
        return id(self.parameter), self.index
