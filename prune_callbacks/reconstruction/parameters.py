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
ALL_PRUNED = "its mask keeps nothing"
TIED = "it is one tensor with a parameter outside of its block"
NOT_PRUNED = 'it is no pruned weight, and only these are trained (trained="weights")'
ROUTER = "it belongs to a router, whose choice of experts training would move"


def not_trained(model: nn.Module, name: str, block: nn.Module, *, frozen: bool = True) -> dict[str, str]:
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
    deciding = [*routers(block), *_routers_of_lists(block)]
    found: dict[str, str] = {}
    for path, parameter in block.named_parameters():
        if frozen and not parameter.requires_grad:
            found[dotted(name, path)] = FROZEN
        elif _memory(parameter) in outside:
            found[dotted(name, path)] = TIED
        elif any(inside(path, router) for router in deciding):
            found[dotted(name, path)] = ROUTER
    return found


def _routers_of_lists(block: nn.Module) -> Iterator[str]:
    """Yields the names of linear layers with one output per member of a list of experts beside them."""
    for name, parent in block.named_modules():
        counts = {len(child) for child in parent.children() if isinstance(child, nn.ModuleList)} - {1}
        for own, child in parent.named_children():
            if isinstance(child, nn.Linear) and child.out_features in counts:
                yield dotted(name, own)


def _memory(parameter: Tensor) -> object:
    """Returns a key that is equal for two parameters in one memory."""
    return parameter.data_ptr() if in_memory(parameter) else id(parameter)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype for sums and small updates of values: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Masters:
    """
    The values that an optimizer updates in place of a block's parameters.

    A parameter in float32 shares its memory with its master. One in 16 bits, in which small updates would be rounded
    away, has a master in float32; `write` rounds it.

    Args:
        parameters: the parameters, by dotted name.

    Attributes:
        holder: a module that holds the masters as parameters of the same names.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.holder = nn.Module()
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            *path, last = name.split(".")
            place = self.holder
            for part in path:
                if part not in place._modules:
                    place._modules[part] = nn.Module()
                place = place.get_submodule(part)
            master = nn.Parameter(parameter.detach().to(wide(parameter.dtype)))
            place._parameters[last] = master
            self._pairs[name] = master, parameter

    @torch.no_grad()
    def write(self) -> None:
        """Rounds every master into its parameter."""
        for master, parameter in self._pairs.values():
            if master.data_ptr() != parameter.data_ptr():
                parameter.copy_(master)

    def take_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sets the masters' gradients."""
        for name, gradient in gradients.items():
            self._pairs[name][0].grad = gradient

    def copies(self) -> dict[str, Tensor]:
        """Returns copies of all masters, by name."""
        return {name: master.detach().clone() for name, (master, _) in self._pairs.items()}

    @torch.no_grad()
    def restore(self, copies: Mapping[str, Tensor]) -> None:
        """Sets all masters, and their parameters, to the result of `copies`."""
        for name, value in copies.items():
            self._pairs[name][0].copy_(value)
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
