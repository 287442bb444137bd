"""Finds the stages of a model, the modules that are pruned one after another, and their targets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.blocks import (
    encoder_and_decoder,
    find_blocks,
    has_forward,
    is_sequence_to_sequence,
    outer_lists,
    refuse_lazy,
)
from prune_callbacks.anatomy.ends import embedded_weights, output_layer
from prune_callbacks.anatomy.names import dotted
from prune_callbacks.anatomy.target import Target
from prune_callbacks.anatomy.targets import (
    all_targets,
    check_parameters,
    holds_targets,
    matches,
    matching,
    matrices,
    targets_of,
    without_routers,
)

LAST_DEFINED = "it is the last layer that is defined, which makes the output; name it in `targets` to prune it too"
LAST_CALLED = "it is the last layer that is called, which makes the output; name it in `targets` to prune it too"
TIED = "its weight is that of an nn.Embedding too, which is never pruned"
FROZEN = "its weight is not trained (requires_grad=False); name it in `targets` to prune it too"
DEPTHWISE = "it is a depthwise convolution, which has few weights; name it in `targets` to prune it too"
TOWER = "it is a list of blocks besides those that are pruned; name it with `blocks` to prune it"
OUTSIDE = "it is outside of the blocks, where nothing is pruned"


@dataclass(frozen=True)
class Stages:
    """
    The stages of a model, in the order of their definition.

    Attributes:
        parts: the stages, (name, module).
        lists: for every stage, the name of the list of blocks that it is a member of; None for a layer that is a stage
            by itself.
        left: the reason for every layer, or list of blocks, that is in no stage, by name.
        found_in_blocks: whether the stages are the blocks of lists. Elsewhere layers have all kinds of shapes: the
            layer that makes the output, and those that do not fit the pattern, stay dense unless they are named.
        last: the stage that was seen to be called last; None: nothing is known of the calls.
    """

    parts: Sequence[tuple[str, nn.Module]]
    lists: Sequence[str | None]
    left: Mapping[str, str] = field(default_factory=dict)
    found_in_blocks: bool = True
    last: str | None = None

    @property
    def ends_behind_blocks(self) -> bool:
        """Returns whether there are blocks, and behind them nothing or a single layer as the last stage."""
        return self.found_in_blocks or (self.lists[-1] is None and any(name is not None for name in self.lists))


def find_stages(model: nn.Module, blocks: str | Sequence[str] | None = None) -> Stages:
    """
    Returns the stages of a model.

    They are the blocks of the lists in `blocks`; else of a model of transformers the blocks of its stack, or of its
    encoder and its decoder; else the members of every outermost `nn.ModuleList`, and all layers outside of these.

    Args:
        model: any module.
        blocks: the name of a list of blocks, or of several.

    Raises:
        ValueError: there is no list of a name in `blocks`, a lazy layer has no weights yet, or there is no layer.
        NoBlocksError: a model of transformers has lists, of which none has as many members as its configuration says.
    """
    if blocks is not None:
        named = _of_lists(model, [blocks] if isinstance(blocks, str) else list(dict.fromkeys(blocks)))
        return _with_left(model, named) if isinstance(model, PreTrainedModel) else named
    refuse_lazy(model)
    if is_sequence_to_sequence(model):
        return _with_left(model, _of_lists(model, encoder_and_decoder(model)))
    if isinstance(model, PreTrainedModel):
        if not outer_lists(model):
            return _of_layers(model)
        first, _ = find_blocks(model)[0]
        return _with_left(model, _of_lists(model, [first.rpartition(".")[0]]))
    return _of_layers(model)


def block_stages(model: nn.Module, blocks: str | None = None) -> Stages:
    """Returns the decoder blocks of a model as its stages, for work that needs one list; see `find_blocks`."""
    found = find_blocks(model, blocks)
    return Stages(found, [found[0][0].rpartition(".")[0]] * len(found))


def _of_lists(model: nn.Module, names: Sequence[str]) -> Stages:
    if not names:
        raise ValueError("blocks is empty: name a list of blocks, or leave it out")
    members = [(name, part) for name in names for part in find_blocks(model, name)]
    return Stages([part for _, part in members], [name for name, _ in members])


def in_lists(stages: Stages) -> Stages:
    """Returns the stages that are blocks of lists; the layers outside of these are left."""
    pairs = list(zip(stages.parts, stages.lists, strict=True))
    blocks = [(part, owner) for part, owner in pairs if owner is not None]
    if not blocks:
        raise ValueError("there is no nn.ModuleList of blocks, inside of which layers lose the same units together")
    single = [part for part, owner in pairs if owner is None]
    outside = {target.stored_name: OUTSIDE for part in single for target in targets_of(*part)}
    return Stages([part for part, _ in blocks], [owner for _, owner in blocks], dict(stages.left) | outside)


def _of_layers(model: nn.Module) -> Stages:
    found = list(_walked("", model, None, set()))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer to prune: no linear layer, convolution, attention or recurrent layer"
        )
    held = {id(parameter) for _, part, _ in found for parameter in part.parameters()}
    left = {
        name: f"it is a parameter of {type(owner).__name__}, which is no layer that can be pruned"
        for name, owner, parameter in _own_parameters(model)
        if parameter.ndim > 1 and id(parameter) not in held and not isinstance(owner, nn.Embedding)
    }
    return Stages([(name, part) for name, part, _ in found], [name for _, _, name in found], left, False)


def _walked(
    name: str, module: nn.Module, owner: str | None, seen: set[int]
) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yields the stages in a module; `owner` is the list of blocks that the module is a member of."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if holds_targets([module]):
        yield name, module, None
    elif owner is not None and has_forward(module):
        if holds_targets(module.modules()):
            yield name, module, owner
        seen |= {id(part) for part in module.modules()}
    else:
        for own, child in module.named_children():
            yield from _walked(dotted(name, own), child, name if isinstance(module, nn.ModuleList) else None, seen)


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for path, owner in model.named_modules():
        for own, parameter in owner.named_parameters(recurse=False):
            yield dotted(path, own), owner, parameter


def _with_left(model: nn.Module, stages: Stages) -> Stages:
    """Returns the stages of a model of transformers with what is outside: other lists of blocks, and single layers."""
    known = {id(module) for _, part in stages.parts for module in part.modules()} | {id(output_layer(model))}
    left: dict[str, str] = {}
    for name, members in outer_lists(model).items():
        inner = [module for module in members.modules() if id(module) not in known]
        if name not in stages.lists and holds_targets(inner):
            left[name] = TOWER
            known |= {id(module) for module in inner}
    for name, module in model.named_modules():
        if id(module) not in known:
            left |= {target.name: OUTSIDE for target in targets_of(name, module)}
    return Stages(stages.parts, stages.lists, left)


def stage_targets(
    model: nn.Module, stages: Stages, targets: Sequence[str] | str | None = None, *, every_kind: bool = True
) -> tuple[dict[str, Target], dict[str, str]]:
    """
    Chooses the targets in stages.

    Returns:
        the targets by name, in the model's order, and why each other layer stays dense, by name; of named targets none.

    Args:
        model: the model.
        stages: its stages.
        targets: patterns of names, see `matching`. Frozen layers beside trained ones, depthwise convolutions in blocks
            and tied weights are looked for only if a pattern matches nothing else. None: all targets by default.
        every_kind: see `find_targets`.

    Raises:
        ValueError: see `find_targets`; or a pattern matches an embedding's weight.
    """
    found = all_targets(stages.parts, every_kind=every_kind)
    kept = _kept_dense(model, stages, found)
    usual = without_routers(found, stages.parts)
    default = {name: target for name, target in usual.items() if name not in kept}
    if targets is None:
        if not default:
            name, reason = next(iter(kept.items()), (next(iter(found)), "it decides which experts a token goes to"))
            raise ValueError(f"no layer of {type(model).__name__} is a target by default; {name}: {reason}")
        check_parameters(default.values())
        return default, {**stages.left, **{found[name].stored_name: reason for name, reason in kept.items()}}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    chosen = {} if patterns else matching(found, patterns, first="")  # which refuses that
    aside = {name for name, reason in kept.items() if reason not in (LAST_DEFINED, LAST_CALLED)}
    near = {name: target for name, target in found.items() if name not in aside}
    for pattern in patterns:
        inside = near if any(matches(target, pattern) for target in near.values()) else found
        chosen |= matching(inside, pattern, first=stages.parts[0][0] if stages.found_in_blocks else "")
    tied = next((name for name in chosen if kept.get(name) == TIED), None)
    if tied is not None:
        raise ValueError(f"layer {tied} cannot be pruned: {TIED}")
    check_parameters(chosen.values())
    return {name: target for name, target in found.items() if name in chosen}, {}


def prunable_weights(model: nn.Module, stages: Stages) -> dict[str, nn.Parameter]:
    """
    Returns all weights of a model that a pruning may have zeroed, by name; see `matrices`.

    Those of embeddings and outside of lists of blocks, where a model has such, are left out.
    """
    towers = [(name, model.get_submodule(name)) for name, reason in stages.left.items() if reason == TOWER]
    found, embedded = matrices([*stages.parts, *towers]), embedded_weights(model)
    return {name: parameter for name, parameter in found.items() if id(parameter) not in embedded}


def _kept_dense(model: nn.Module, stages: Stages, found: Mapping[str, Target]) -> dict[str, str]:
    """Returns the targets that stay dense unless they are named, with the reason."""
    if stages.found_in_blocks:
        return {name: DEPTHWISE for name, target in found.items() if target.depthwise}
    embedded = embedded_weights(model)
    plain = {name: target for name, target in found.items() if target.why_no_parameter is None}
    kept = {name: TIED for name, target in plain.items() if id(target.parameter) in embedded}
    if any(target.parameter.requires_grad for target in plain.values()):
        kept |= {name: FROZEN for name, target in plain.items() if not target.parameter.requires_grad}
    last = _output(stages, kept)
    reason = LAST_DEFINED if stages.last is None else LAST_CALLED
    return kept if last is None or last not in found else kept | {last: reason}


def _output(stages: Stages, kept: Mapping[str, str]) -> str | None:
    """Returns the name of the layer that makes the output: the last stage that is trained, if it is a single layer."""
    beside_trained = FROZEN in kept.values()
    for (name, part), owner in zip(reversed(stages.parts), reversed(stages.lists), strict=True):
        trained = not beside_trained or any(parameter.requires_grad for parameter in part.parameters())
        if name == stages.last or (stages.last is None and trained):
            own = list(targets_of(name, part))
            return own[0].name if owner is None and len(own) == 1 and own[0].name not in kept else None
    return None
