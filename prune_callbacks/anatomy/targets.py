"""Finds the matrices to prune in the parts of a model, and further weights that a pruning may have zeroed."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from prune_callbacks.anatomy.adapters import adapter_modules
from prune_callbacks.anatomy.convolution import CONVOLUTIONS, ConvTarget
from prune_callbacks.anatomy.experts import expert_targets, fused_parameters, routers
from prune_callbacks.anatomy.names import belongs, dotted
from prune_callbacks.anatomy.target import LINEAR, LayerTarget, Target
from prune_callbacks.anatomy.torch_modules import RECURRENT, attention_targets, recurrent_targets

SPARSE = 0.01
"""The least fraction of zeros in a tensor that counts as pruned."""


def find_targets(
    parts: Sequence[tuple[str, nn.Module]], targets: Sequence[str] | str | None = None, *, every_kind: bool = False
) -> dict[str, Target]:
    """
    Finds the matrices to prune in parts of a model; returns them by full name, in the model's order.

    Warns of matrices that share their weight with an earlier one, and leaves them out.

    Args:
        parts: decoder blocks or other modules, by full name; see `find_blocks` and `find_stages`.
        targets: see `matching`. None: all but the `routers`.
        every_kind: whether to include, besides linear layers, convolutions, the matrices of attention and recurrent
            layers of torch, and those of fused experts.

    Raises:
        ValueError: a pattern matches nothing, there is nothing to prune, or the weight of a matching layer is no
            parameter, such as under `torch.nn.utils.prune` or a parametrization.
    """
    found = all_targets(parts, every_kind=every_kind)
    chosen = without_routers(found, parts) if targets is None else matching(found, targets, first=parts[0][0])
    check_parameters(chosen.values())
    return chosen


def all_targets(parts: Sequence[tuple[str, nn.Module]], *, every_kind: bool) -> dict[str, Target]:
    """Returns every matrix in the parts, routers among them; warns of tied ones, of which only the first is there."""
    found: dict[str, Target] = {}
    owners: dict[tuple[object, ...], str] = {}
    for target in _prunable(parts, every_kind=every_kind):
        owner = owners.setdefault(target.identity, target.name)
        if owner == target.name:
            found[target.name] = target
        else:
            warnings.warn(f"{target.name} shares its weight with {owner} and is pruned with it", stacklevel=4)
    if not found:
        raise ValueError(
            f"{' and '.join(name or 'the model' for name, _ in list(parts)[:2])} hold no nn.Linear or Conv1D to prune"
            f"{', nor a convolution or another matrix' if every_kind else ''}. Packed or quantized layers cannot be "
            "pruned: load the model with its weights dequantized"
        )
    return found


def matching(found: Mapping[str, Target], targets: Sequence[str] | str, *, first: str) -> dict[str, Target]:
    """
    Returns the targets that match one of the shell-style patterns, in the model's order.

    A pattern is compared with full names of layers ("*.mlp.*") or parameters ("head.weight"), and the last part of a
    layer's ("down_proj"). It matches all matrices of an attention or a recurrent layer by its name, one expert by its
    name, which ends in the expert's index ("*.experts.down_proj.3"), or all experts by the name of their parameter
    ("down_proj"); the parts of an attention's `in_proj_weight` likewise.

    Args:
        found: the targets to choose from, by name.
        targets: the patterns.
        first: the name of the part whose layers an error lists; "" for all of them.

    Raises:
        ValueError: there is no pattern, or one matches nothing.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets is empty, so nothing would be pruned; None prunes every linear layer of the blocks")
    for pattern in patterns:
        if not any(matches(target, pattern) for target in found.values()):
            shown, where = _shown(found, first), "The first block has" if first else "There are"
            close = get_close_matches(pattern, [*shown, *(name.rsplit(".", 1)[-1] for name in shown)], 1)
            meant = f". Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"target {pattern!r} matches no layer. {where} {', '.join(shown[:20])}{meant}")
    return {name: target for name, target in found.items() if any(matches(target, p) for p in patterns)}


def _shown(found: Mapping[str, Target], first: str) -> list[str]:
    """Returns the names of the targets in a part; parts of one parameter have one."""
    near = [target for name, target in found.items() if belongs(name, first)]
    return list(dict.fromkeys(f"{t.parameter_name}.*" if t.parts > 1 else t.name for t in near))


def without_routers(found: Mapping[str, Target], parts: Sequence[tuple[str, nn.Module]]) -> dict[str, Target]:
    """Returns the targets that are no routers, which stay dense by default."""
    deciding = {dotted(part_name, name) for part_name, part in parts for name in routers(part)}
    return {name: target for name, target in found.items() if name not in deciding}


def check_parameters(targets: Iterable[Target]) -> None:
    """Raises ValueError, naming the layer, for a weight that is no parameter."""
    for target in targets:
        if target.why_no_parameter is not None:
            raise ValueError(f"layer {target.name}: {target.why_no_parameter}, or choose other layers with `targets`")


def refuse_parts(who: str, targets: Iterable[Target]) -> None:
    """Raises ValueError, naming who asked, if only some of the targets in a parameter are chosen."""
    chosen = list(targets)
    counts = Counter(target.parameter_name for target in chosen)
    for target in chosen:
        name = target.parameter_name
        if counts[name] < target.parts:
            raise ValueError(
                f"{who} prunes all {'experts' if target.routed else 'parts'} of {name} or none, and the targets choose "
                f"{counts[name]} of {target.parts}; choose all, e.g. with targets={name!r}"
            )


def matrices(parts: Sequence[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """
    Returns all floating-point weights in the parts that a pruning may have zeroed, by name; tied ones once.

    They are the weights of all kinds of targets, of routers, and the tensors of fused experts, including experts whose
    module does not say how it stores them.
    """
    found: dict[str, nn.Parameter] = {}
    for part_name, part in parts:
        plain = (t for t in _prunable([(part_name, part)], every_kind=True) if t.why_no_parameter is None)
        found |= parameters_of(plain)
        for name in routers(part):
            weight = part.get_submodule(name)._parameters.get("weight")
            found |= {} if weight is None else {dotted(part_name, name, "weight"): weight}
        found |= _fused(part_name, part)
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


def _fused(part_name: str, part: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the tensors of a part that hold one matrix per expert, by full name."""
    return {dotted(part_name, place, name): parameter for place, _, name, parameter in fused_parameters(part)}


def _expert_matches(name: str, pattern: str) -> bool:
    return any(fnmatchcase(known, pattern) for known in (name, name.rsplit(".", 1)[-1], f"{name}.0"))


def _prunable(parts: Sequence[tuple[str, nn.Module]], *, every_kind: bool) -> Iterator[Target]:
    for part_name, part in parts:
        inner = adapter_modules(part)
        for name, module in part.named_modules():
            if every_kind and isinstance(module, nn.MultiheadAttention):
                inner.add(dotted(name, "out_proj"))
            if name not in inner:
                yield from targets_of(dotted(part_name, name), module, every_kind=every_kind)


def targets_of(path: str, module: nn.Module, *, every_kind: bool = True) -> Iterator[Target]:
    """Yields the targets in a module's own parameters, with full name `path`; see `find_targets` for the kinds."""
    if isinstance(module, LINEAR):
        yield LayerTarget.of(path, module)
    elif not every_kind:
        return
    elif isinstance(module, CONVOLUTIONS):
        yield ConvTarget.of(path, module)
    elif isinstance(module, nn.MultiheadAttention):
        yield from attention_targets(path, module)
    elif isinstance(module, RECURRENT):
        yield from recurrent_targets(path, module)
    else:
        yield from expert_targets(path, module)


def holds_targets(modules: Iterable[nn.Module]) -> bool:
    """Returns whether one of the modules has a target in its own parameters."""
    return any(next(targets_of("", module), None) is not None for module in modules)


def matches(target: Target, pattern: str) -> bool:
    """Returns whether a pattern matches a target; see `matching`."""
    whole = target.parameter_name if target.parts > 1 else target.name
    last = {name.rsplit(".", 1)[-1] for name in (whole, target.layer)}
    names = {target.name, whole, target.layer, target.parameter_name, *last}
    return any(fnmatchcase(name, pattern) for name in names)


def parameters_of(targets: Iterable[Target]) -> dict[str, nn.Parameter]:
    """Returns the parameters that hold the targets, each once, by full name."""
    return {target.parameter_name: target.parameter for target in targets}
