"""Chooses the parameters of a block that reconstruction trains, and keeps float32 copies of those in 16 bits."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.experts import routers
from prune_callbacks.anatomy.memory import in_memory
from prune_callbacks.anatomy.names import dotted, inside
from prune_callbacks.sparsity import MaskSet

FROZEN = "it is not trained (requires_grad=False)"
TIED = "it is one tensor with a parameter outside of its block"
ROUTER = "it belongs to a router, whose choice of experts training would move"


def held_back(model: nn.Module, name: str, block: nn.Module, *, frozen: bool = True) -> dict[str, str]:
    """
    Returns the reason for every parameter of a block that reconstruction leaves as it is, by full name.

    Args:
        model: the model.
        name: the block's name in the model.
        block: the block.
        frozen: whether parameters with `requires_grad=False` stay as they are; False for a model that is read from
            files, where the attribute says nothing.
    """
    outside = {_memory(p) for path, p in model.named_parameters(remove_duplicate=False) if not inside(path, name)}
    deciding = routers(block)
    found: dict[str, str] = {}
    for path, parameter in block.named_parameters():
        if frozen and not parameter.requires_grad:
            found[dotted(name, path)] = FROZEN
        elif _memory(parameter) in outside:
            found[dotted(name, path)] = TIED
        elif any(inside(path, router) for router in deciding):
            found[dotted(name, path)] = ROUTER
    return found


def _memory(parameter: Tensor) -> object:
    """Returns a key that is equal for two parameters in one memory."""
    return parameter.data_ptr() if in_memory(parameter) and parameter.numel() else id(parameter)


class Masters(nn.Module):
    """
    The values that an optimizer updates in place of a block's parameters, under the same names.

    A parameter in float32 shares its memory with its master. One in 16 bits, in which small updates would be rounded
    away, has a master in float32; `write` rounds it.

    Args:
        parameters: the parameters, by dotted name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._written = dict(parameters)
        for name, parameter in parameters.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            wide = torch.promote_types(parameter.dtype, torch.float32)
            holder.register_parameter(last, nn.Parameter(parameter.detach().to(wide)))

    @torch.no_grad()
    def write(self) -> None:
        """Rounds every master into its parameter."""
        for name, parameter in self._written.items():
            master = self.get_parameter(name).detach()
            if master.data_ptr() != parameter.data_ptr():
                parameter.copy_(master)

    @torch.no_grad()
    def take_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sets the masters' gradients."""
        for name, gradient in gradients.items():
            master = self.get_parameter(name)
            master.grad = gradient.to(master.dtype)

    def values(self) -> dict[str, Tensor]:
        """Returns copies of all masters, by name."""
        return {name: master.detach().clone() for name, master in self.named_parameters()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Sets all masters, and their parameters, to the result of `values`."""
        for name, value in values.items():
            self.get_parameter(name).copy_(value)
        self.write()


@contextmanager
def only_trained(block: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Temporarily makes the trained parameters of a block the only ones that autograd differentiates by."""
    before = {parameter: parameter.requires_grad for parameter in block.parameters()}
    chosen = {id(parameter) for parameter in trained.values()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, was in before.items():
            parameter.requires_grad_(was)


def masks_of_block(masks: MaskSet, name: str, parameters: Iterable[str]) -> MaskSet:
    """Returns the masks of a block's parameters, by their names in the block; some may have none."""
    return MaskSet({path: masks[dotted(name, path)] for path in parameters if dotted(name, path) in masks})
