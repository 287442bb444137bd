"""Finds the matrices to prune in the decoder blocks, and what else may hold zeros of a pruning."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from prune_callbacks.anatomy.adapters import adapter_modules
from prune_callbacks.anatomy.experts import expert_targets, fused_parameters, routers
from prune_callbacks.anatomy.targets import LINEAR, LayerTarget, Target

SPARSE = 0.01
"""The fraction of zeros from which on a tensor is taken for a pruned one."""


def find_targets(
    blocks: Sequence[tuple[str, nn.Module]], targets: Sequence[str] | str | None = None, *, experts: bool = False
) -> dict[str, Target]:
    """
    Finds the matrices to prune inside the blocks, by full name, in the model's order.

    Args:
        blocks: what `find_blocks` returned.
        targets: shell-style patterns matched against full names ("*.mlp.*") or against the last part
            ("down_proj"); None for every `nn.Linear` and `Conv1D` in the blocks but the `routers`.
        experts: also the matrices of fused experts, as `ExpertTarget`. One is matched by its name, which ends in the
            expert's number ("*.experts.down_proj.3"), or for all experts by the parameter's ("down_proj").

    Raises:
        ValueError: a pattern matches nothing, or there is nothing to prune.
    """
    found: dict[str, Target] = {}
    owners: dict[tuple[int, int], str] = {}
    for target in _prunable(blocks, experts=experts):
        owner = owners.setdefault(target.identity, target.name)
        if owner == target.name:
            found[target.name] = target
        else:
            warnings.warn(
                f"{target.name} shares its weight with {owner} and is pruned with it, on that one's inputs",
                stacklevel=3,
            )
    if not found:
        raise ValueError(
            "the decoder blocks hold no nn.Linear or Conv1D to prune. Packed or quantized layers cannot be pruned: "
            "load the model with its weights dequantized"
        )
    if targets is None:
        deciding = {f"{block_name}.{name}" for block_name, block in blocks for name in routers(block)}
        return {name: target for name, target in found.items() if name not in deciding}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets is empty, so nothing would be pruned; None prunes every linear layer of the blocks")
    for pattern in patterns:
        if not any(_matches(target, pattern) for target in found.values()):
            first = [target for name, target in found.items() if name.startswith(blocks[0][0] + ".")]
            shown = [f"{t.parameter_name}.*" if t.shares_parameter else t.name for t in first]
            raise ValueError(
                f"target {pattern!r} matches no layer. The first block has {', '.join(dict.fromkeys(shown))}"
            )
    return {name: target for name, target in found.items() if any(_matches(target, p) for p in patterns)}


def matrices(blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """
    All weights in the blocks that may hold zeros of a pruning, by name, whatever is pruned by default.

    Those of every `nn.Linear` and `Conv1D`, routers of any kind, and tensors of experts, also of experts whose module
    does not say how it stores them.
    """
    found: dict[str, nn.Parameter] = {}
    for block_name, block in blocks:
        found |= parameters_of(_prunable([(block_name, block)], experts=False))
        found |= {
            f"{block_name}.{name}.weight": block.get_submodule(name).get_parameter("weight") for name in routers(block)
        }
        found |= _fused(block_name, block)
    once = {id(parameter): name for name, parameter in reversed(found.items())}
    return {name: p for name, p in found.items() if once[id(p)] == name and p.is_floating_point()}


def sparse_experts(
    blocks: Sequence[tuple[str, nn.Module]], targets: Sequence[str] | str | None = None
) -> dict[str, nn.Parameter]:
    """
    Tensors of experts that hold 1 % of zeros or more, by name: what is left out where linear layers only are taken.

    Args:
        blocks: what `find_blocks` returned.
        targets: as of `find_targets`.
    """
    patterns = [targets] if isinstance(targets, str) else targets
    found = {name: parameter for block in blocks for name, parameter in _fused(*block).items()}
    return {
        name: parameter
        for name, parameter in found.items()
        if (patterns is None or any(_expert_matches(name, pattern) for pattern in patterns))
        and float((parameter.detach() == 0).float().mean()) >= SPARSE
    }


def _fused(block_name: str, block: nn.Module) -> dict[str, nn.Parameter]:
    """Tensors with a matrix for each of several experts."""
    return {
        ".".join(filter(None, (block_name, place, attribute))): parameter
        for place, _, attribute, parameter in fused_parameters(block)
    }


def _expert_matches(name: str, pattern: str) -> bool:
    return any(fnmatchcase(known, pattern) for known in (name, name.rsplit(".", 1)[-1], f"{name}.0"))


def _prunable(blocks: Sequence[tuple[str, nn.Module]], *, experts: bool) -> Iterator[Target]:
    for block_name, block in blocks:
        inner = adapter_modules(block)
        for name, module in block.named_modules():
            path = f"{block_name}.{name}" if name else block_name
            if isinstance(module, LINEAR) and name not in inner:
                yield LayerTarget.of(path, module)
            if experts:
                yield from expert_targets(path, module)


def _matches(target: Target, pattern: str) -> bool:
    whole = target.parameter_name if target.shares_parameter else target.name
    return any(fnmatchcase(known, pattern) for known in (target.name, whole, whole.rsplit(".", 1)[-1]))


def parameters_of(targets: Iterable[Target]) -> dict[str, nn.Parameter]:
    """Returns the parameters that hold the targets, by full name; one that holds several targets is there once."""
    return {target.parameter_name: target.parameter for target in targets}
