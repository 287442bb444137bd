"""Mixtures of experts whose matrices lie in one parameter: what is pruned there, and what is not."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.naming import inside
from prune_callbacks.anatomy.targets import ExpertTarget, Target
from prune_callbacks.parallel.shapes import whole_shape

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NOT_TAKEN = "it holds the weights of several layers (experts) in one tensor, which this pruner does not take"
UNKNOWN = (
    "it holds the weights of several layers (experts) in one tensor, and its module does not say which dimension is "
    "the input (`is_transposed`)"
)
DECIDES = "it decides which experts a token goes to, and what they count"


def fused_parameters(block: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Parameters of a block that hold several matrices: (module's name, module, parameter's name there, parameter)."""
    for name, owner in block.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            shape = whole_shape(parameter)
            several = len(shape) >= 3 and sum(size > 1 for size in shape) > 1  # RWKV has vectors of (1, 1, features)
            if several and not isinstance(owner, CONVOLUTIONS):
                yield name, owner, attribute, parameter


def expert_targets(name: str, owner: nn.Module) -> Iterator[ExpertTarget]:
    """
    Yields the matrices of a module of experts, of full name `name`.

    Only of modules that say how they store them: `is_transposed`, which transformers' interface for experts sets.
    """
    stored = getattr(owner, "is_transposed", None)
    for attribute, parameter in owner.named_parameters(recurse=False):
        shape = whole_shape(parameter)
        if isinstance(stored, bool) and len(shape) == 3 and not isinstance(owner, CONVOLUTIONS):
            for index in range(shape[0]):
                yield ExpertTarget(f"{name}.{attribute}.{index}", owner, attribute, stored, index)


def routers(block: nn.Module) -> dict[str, str]:
    """
    What decides which experts a token goes to, in a block with fused experts: names of modules, and why they are dense.

    Structure decides: beside the experts, a weight with one output for every expert, or with a single one (the gate of
    a shared expert), that is its module's only one or stands directly beside them. A few weights, on which all that
    follows depends. Where experts stand in the block itself, all of its layers stand beside them: then those count only
    if nothing else decides.
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
    """Of a module whose `weight` is a matrix, the weight's shape."""
    weight = getattr(module, "weight", None)
    return whole_shape(weight) if isinstance(weight, Tensor) and len(whole_shape(weight)) == 2 else None


def dense_in_mixtures(
    blocks: Sequence[tuple[str, nn.Module]], chosen: Mapping[str, Target]
) -> tuple[dict[str, str], dict[str, str]]:
    """
    What stays dense where experts are fused, with the reason: tensors of experts that are no targets, and routers.

    Args:
        blocks: of the model.
        chosen: the targets, by name.

    Raises:
        ValueError: experts are packed in integers.
    """
    fused: dict[str, str] = {}
    deciding: dict[str, str] = {}
    taken = {id(target.parameter) for target in chosen.values()}
    for block_name, block in blocks:
        for place, owner, attribute, parameter in fused_parameters(block):
            name = ".".join(filter(None, (block_name, place, attribute)))
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


def describe_dense(fused: Mapping[str, str], deciding: Mapping[str, str]) -> list[str]:
    """What `dense_in_mixtures` found, as sentences for warnings: how many of either kind, and the first."""
    kinds = {"tensors": fused, "routers": deciding}
    return [
        f"{len(dense)} {kind} stay dense, first {first}: {dense[first]}"
        for kind, dense in kinds.items()
        for first in list(dense)[:1]
    ]
