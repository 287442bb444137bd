"""Finds the matrices to prune in the decoder blocks, and further weights that a pruning may have zeroed."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from prune_callbacks.anatomy.adapters import adapter_modules
from prune_callbacks.anatomy.experts import expert_targets, fused_parameters, routers
from prune_callbacks.anatomy.target import LINEAR, LayerTarget, Target

SPARSE = 0.01
"""The least fraction of zeros in a tensor that counts as pruned."""


def find_targets(
    blocks: Sequence[tuple[str, nn.Module]], targets: Sequence[str] | str | None = None, *, experts: bool = False
) -> dict[str, Target]:
    """
    Finds the matrices to prune inside the blocks; returns them by full name, in the model's order.

    Warns of matrices that share their weight with an earlier one, and leaves them out.

    Args:
        blocks: the result of `find_blocks`.
        targets: shell-style patterns, matched against full names ("*.mlp.*") or their last part ("down_proj"). None:
            every `nn.Linear` and `Conv1D` in the blocks except the `routers`.
        experts: whether to include the matrices of fused experts, as `ExpertTarget`. A pattern matches one expert by
            its name, which ends in the expert's index ("*.experts.down_proj.3"), or all experts by the name of their
            parameter ("down_proj").

    Raises:
        ValueError: a pattern matches nothing, there is nothing to prune, or the weight of a matching layer is no
            parameter, such as under `torch.nn.utils.prune` or a parametrization.
    """
    chosen = _chosen(blocks, targets, experts=experts)
    for name, target in chosen.items():
        if target.why_no_parameter is not None:
            raise ValueError(f"layer {name}: {target.why_no_parameter}, or choose other layers with `targets`")
    return chosen


def _chosen(
    blocks: Sequence[tuple[str, nn.Module]], targets: Sequence[str] | str | None, *, experts: bool
) -> dict[str, Target]:
    found: dict[str, Target] = {}
    owners: dict[tuple[object, ...], str] = {}
    for target in _prunable(blocks, experts=experts):
        owner = owners.setdefault(target.identity, target.name)
        if owner == target.name:
            found[target.name] = target
        else:
            warnings.warn(
                f"{target.name} shares its weight with {owner} and is pruned with it",
                stacklevel=4,
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
    Returns all floating-point weights in the blocks that a pruning may have zeroed, by name; tied ones once.

    They are the weights of every `nn.Linear` and `Conv1D`, of routers, and the tensors of fused experts, including
    experts whose module does not say how it stores them.
    """
    found: dict[str, nn.Parameter] = {}
    for block_name, block in blocks:
        plain = (t for t in _prunable([(block_name, block)], experts=False) if t.why_no_parameter is None)
        found |= parameters_of(plain)
        for name in routers(block):
            weight = block.get_submodule(name)._parameters.get("weight")
            found |= {} if weight is None else {f"{block_name}.{name}.weight": weight}
        found |= _fused(block_name, block)
    once = {id(parameter): name for name, parameter in reversed(found.items())}
    return {name: p for name, p in found.items() if once[id(p)] == name and p.is_floating_point()}


def sparse_experts(
    blocks: Sequence[tuple[str, nn.Module]], targets: Sequence[str] | str | None = None
) -> dict[str, nn.Parameter]:
    """
    Returns the fused expert tensors that hold at least 1 % zeros, by name.

    Callers that handle linear layers only leave these out.

    Args:
        blocks: the result of `find_blocks`.
        targets: see `find_targets`.
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
    """Returns the tensors of a block that hold one matrix per expert, by full name."""
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
    """Returns the parameters that hold the targets, each once, by full name."""
    return {target.parameter_name: target.parameter for target in targets}
