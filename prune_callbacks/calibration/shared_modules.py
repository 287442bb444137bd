"""Finds modules that a block shares with other parts of a model, and so has the inputs of both."""

from collections.abc import Iterator, Sequence, Set

from torch import nn

from prune_callbacks.calibration.stand_ins import NotAChainError


def refuse_shared_modules(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raises NotAChainError if a block shares a module with weights with another block or the rest of the model."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            if _has_weights(module) and owner.setdefault(id(module), index) != index:
                raise NotAChainError(f"its blocks {owner[id(module)]} and {index} share a {type(module).__name__}")
    for module in _besides(model, {id(block) for block in blocks}):
        if _has_weights(module) and id(module) in owner:
            raise NotAChainError(f"its block {owner[id(module)]} shares a {type(module).__name__} with other parts")


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _besides(model: nn.Module, blocks: Set[int]) -> Iterator[nn.Module]:
    """Yields the modules of a model that are not only inside of blocks, given by their ids."""
    seen: set[int] = set()
    left = [model]
    while left:
        module = left.pop()
        if id(module) not in blocks and id(module) not in seen:
            seen.add(id(module))
            yield module
            left += module.children()
