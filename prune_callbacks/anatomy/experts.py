"""Mixtures of experts with fused matrices, all in one parameter: finds the matrices to prune and the dense ones."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.names import dotted, inside
from prune_callbacks.anatomy.target import ExpertTarget, Target
from prune_callbacks.anatomy.torch_modules import LEFT_DENSE
from prune_callbacks.parallel.shapes import whole_shape

NOT_TAKEN = "it holds the weights of several layers (experts) in one tensor, which this pruner does not support"
UNKNOWN = (
    "it holds the weights of several layers (experts) in one tensor, and its module does not say which dimension is "
    "the input (`is_transposed`)"
)
DECIDES = "it is a router: it selects a token's experts and their weights"


def fused_parameters(block: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yields parameters of a block with several matrices each: (module name, module, attribute name, parameter)."""
    for name, owner in block.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            shape = whole_shape(parameter)
            several = len(shape) >= 3 and sum(size > 1 for size in shape) > 1  # RWKV stores vectors as (1, 1, features)
            if several and not isinstance(owner, LEFT_DENSE):
                yield name, owner, attribute, parameter


def expert_targets(name: str, owner: nn.Module) -> Iterator[ExpertTarget]:
    """
    Yields the matrices of a module of experts with full name `name`.

    A module yields none unless its attribute `is_transposed`, which transformers' interface for experts sets, says how
    the matrices are stored.
    """
    stored = getattr(owner, "is_transposed", None)
    for attribute, parameter in owner.named_parameters(recurse=False):
        shape = whole_shape(parameter)
        if isinstance(stored, bool) and len(shape) == 3 and not isinstance(owner, LEFT_DENSE):
            for index in range(shape[0]):
                yield ExpertTarget(dotted(name, attribute, str(index)), owner, attribute, stored, index)


def routers(block: nn.Module) -> dict[str, str]:
    """
    Returns the routers of a block with fused experts: names of modules, with the reason why they stay dense.

    A router has few weights, and the outputs of all experts depend on them. Routers are found by structure. In the
    module that contains the experts, a router is a layer with one output per expert, or with a single output (the gate
    of a shared expert). It is either a sibling of the experts or the only matrix of its own module. If the block itself
    contains the experts, all of the block's layers are their siblings; then siblings count only if no other router is
    found.
    """
    found: dict[str, str] = {}
    beside: dict[str, str] = {}
    for place, _, _, fused in fused_parameters(block):
        above = place.rpartition(".")[0]
        for name, module in block.get_submodule(above).named_modules():
            path = f"{above}.{name}" if above and name else above or name
            shape = _matrix_shape(module)
            if not name or inside(path, place) or shape is None or shape[0] not in (1, whole_shape(fused)[0]):
                continue
            parent = path.rpartition(".")[0]
            if parent == above:
                (found if above else beside)[path] = DECIDES
            elif sum(_matrix_shape(child) is not None for child in block.get_submodule(parent).children()) == 1:
                found[path] = DECIDES
    return found or beside


def _matrix_shape(module: nn.Module) -> torch.Size | None:
    """Returns the shape of a module's `weight` if it is a matrix, else None."""
    weight = getattr(module, "weight", None)
    return whole_shape(weight) if isinstance(weight, Tensor) and len(whole_shape(weight)) == 2 else None


def dense_in_mixtures(
    blocks: Sequence[tuple[str, nn.Module]], chosen: Mapping[str, Target]
) -> tuple[dict[str, str], dict[str, str]]:
    """
    Returns why weights stay dense, by name, in two mappings: untargeted tensors of fused experts, untargeted routers.

    Args:
        blocks: the model's decoder blocks.
        chosen: the targets, by name.

    Raises:
        ValueError: experts are packed in integers.
    """
    fused: dict[str, str] = {}
    deciding: dict[str, str] = {}
    taken = {id(target.parameter) for target in chosen.values()}
    for block_name, block in blocks:
        for place, owner, attribute, parameter in fused_parameters(block):
            name = dotted(block_name, place, attribute)
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} holds experts packed in {parameter.dtype}, which cannot be pruned; load the model with "
                    "its weights dequantized (Mxfp4Config(dequantize=True) for GPT-OSS), or choose other layers with "
                    "`targets`"
                )
            if id(parameter) not in taken:
                fused[name] = NOT_TAKEN if isinstance(getattr(owner, "is_transposed", None), bool) else UNKNOWN
        deciding |= {f"{block_name}.{name}": reason for name, reason in routers(block).items()}
    return fused, {name: reason for name, reason in deciding.items() if name not in chosen}


def describe_dense(
    fused: Mapping[str, str], deciding: Mapping[str, str], others: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Returns a sentence for each kind of weights that stay dense: its number, its first member, and the reason."""
    kinds = {"tensors": fused, "routers": deciding, "matrices": others}
    return [
        f"{len(dense)} {kind} stay dense, first {first}: {dense[first]}"
        for kind, dense in kinds.items()
        for first in list(dense)[:1]
    ]
