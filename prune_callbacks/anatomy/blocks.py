"""Finds the language model in a module, and the decoder blocks of a model."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel


def find_language_model(module: nn.Module) -> nn.Module:
    """
    Returns the outermost `transformers` model inside `module` (a LightningModule, a wrapper), else `module` itself.

    Of several (a student and its teacher), returns the only trained one. A module without a `forward` of its own stands
    for its only child with parameters.

    Raises:
        ValueError: there are several, of which not exactly one has parameters that require gradients.
    """
    names = [name for name, m in module.named_modules() if isinstance(m, PreTrainedModel)]
    outer = [n for n in names if not any(n != o and (not o or n.startswith(o + ".")) for o in names)]
    trained = [n for n in outer if any(p.requires_grad for p in module.get_submodule(n).parameters())]
    if len(outer) > 1 and len(trained) != 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(outer)} language models, {outer}, of which {len(trained)} are "
            "trained; one must be: freeze the others (model.requires_grad_(False))"
        )
    if outer:
        return module.get_submodule(trained[0] if len(outer) > 1 else outer[0])
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    alone = len(children) == 1 and not has_forward(module) and has_forward(children[0])
    return children[0] if alone else module


def has_forward(module: nn.Module) -> bool:
    """Returns whether a module defines `forward`; `nn.Module` and Lightning's `LightningModule` only raise an error."""
    own = type(module).forward
    return own is not nn.Module.forward and own.__qualname__ != "LightningModule.forward"


def is_sequence_to_sequence(model: nn.Module) -> bool:
    """Returns whether a model has an encoder and a decoder, by its configuration."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class NoBlocksError(ValueError):
    """
    The decoder blocks of a model cannot be found by structure.

    Args:
        reason: the reason, without advice.
        lists: the names of the lists that could be blocks.
    """

    def __init__(self, reason: str, lists: Sequence[str]) -> None:
        example = f', e.g. blocks="{lists[0]}"' if lists else ""
        super().__init__(f'{reason}. Name the list of blocks with blocks="..."{example}; found {list(lists)}')
        self.reason = reason


def find_blocks(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Module]]:
    """
    Returns the decoder blocks of a model, in order, as (name, module).

    They are found by structure, not by a table of model families: the blocks are the outermost `nn.ModuleList` with as
    many members as the configuration has layers. Of several such lists, the one with most parameters is taken.

    Args:
        model: a causal language model.
        name: the dotted name of the list of blocks, e.g. "model.layers", where the structure is ambiguous.

    Raises:
        ValueError: `name` is not an `nn.ModuleList`, or a lazy layer of the model has no weights yet.
        NoBlocksError: no list of blocks is found, or the model has one for its encoder and one for its decoder.
    """
    empty = next((n for n, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if empty is not None:
        raise ValueError(
            f"layer {empty.rpartition('.')[0]} is lazy and has no weights yet; run the model once on a batch first"
        )
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is None:
        chosen = _found(model, lists)
    elif name in lists:
        chosen = name
    else:
        raise ValueError(f"blocks={name!r} is no nn.ModuleList of {type(model).__name__}; it has {sorted(lists)}")
    return [(f"{chosen}.{i}", block) for i, block in enumerate(lists[chosen])]


def _found(model: nn.Module, lists: Mapping[str, nn.ModuleList]) -> str:
    """Returns the name of the list of decoder blocks; raises NoBlocksError if there is none, or there are two."""
    who = type(model).__name__
    outer = [n for n in lists if not any(n != o and n.startswith(o + ".") for o in lists)]
    if is_sequence_to_sequence(model):
        raise NoBlocksError(
            f"{who} is a sequence-to-sequence model: its encoder and its decoder are two lists of blocks, and one list "
            "is pruned at a time",
            outer,
        )
    depth = _configured_depth(model)
    candidates = [n for n in outer if len(lists[n]) == depth] or ([] if depth else outer)
    if not candidates:
        why = f"no nn.ModuleList has the configuration's {depth} layers" if depth else "it has no nn.ModuleList"
        raise NoBlocksError(f"no decoder blocks found in {who}: {why}", sorted(lists))
    return max(candidates, key=lambda n: sum(p.numel() for p in lists[n].parameters()))


def _configured_depth(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
