"""Finds the language model in a module, and the decoder blocks of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel


def find_language_model(module: nn.Module) -> nn.Module:
    """
    Returns the outermost `transformers` model inside `module` (a LightningModule, a wrapper), else `module` itself.

    Of several (a student and its teacher), returns the only trained one.

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
    return module.get_submodule(trained[0] if len(outer) > 1 else outer[0]) if outer else module


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
    refuse_lazy(model)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is None:
        chosen = _found(model, lists)
    elif name in lists:
        chosen = name
    else:
        raise ValueError(f"blocks={name!r} is no nn.ModuleList of {type(model).__name__}; it has {sorted(lists)}")
    return [(f"{chosen}.{i}", block) for i, block in enumerate(lists[chosen])]


def refuse_lazy(model: nn.Module) -> None:
    """Raises ValueError if a lazy layer of a model has no weights yet."""
    empty = next((n for n, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if empty is not None:
        raise ValueError(
            f"layer {empty.rpartition('.')[0]} is lazy and has no weights yet; run the model once on a batch first"
        )


def outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Returns the `nn.ModuleList`s of a model that are inside of no other one and not empty, by name."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    return {n: m for n, m in lists.items() if not any(n != o and n.startswith(o + ".") for o in lists)}


def encoder_and_decoder(model: nn.Module) -> list[str]:
    """
    Returns the names of the lists of blocks in the encoder and in the decoder of a sequence-to-sequence model.

    Raises:
        NoBlocksError: the encoder or the decoder has no such list.
    """
    lists, found = outer_lists(model), []
    for part in ("encoder", "decoder"):
        inside = [n for n in lists if f".{part}." in f".{n}"]
        if not inside:
            raise NoBlocksError(f"no blocks found in the {part} of {type(model).__name__}", list(lists))
        found.append(max(inside, key=lambda n: sum(p.numel() for p in lists[n].parameters())))
    return found


def _found(model: nn.Module, lists: Mapping[str, nn.ModuleList]) -> str:
    """Returns the name of the list of decoder blocks; raises NoBlocksError if there is none, or there are two."""
    who = type(model).__name__
    outer = list(outer_lists(model))
    if is_sequence_to_sequence(model):
        raise NoBlocksError(
            f"{who} is a sequence-to-sequence model: its encoder and its decoder are two lists of blocks, and this "
            "takes one list at a time",
            outer,
        )
    depth = _configured_depth(model)
    candidates = [n for n in outer if len(lists[n]) == depth] or ([] if depth else outer)
    if not candidates:
        why = f"no nn.ModuleList has the configuration's {depth} layers" if depth else "it has no nn.ModuleList"
        raise NoBlocksError(f"no decoder blocks found in {who}: {why}", sorted(lists))
    candidates = _of_the_text(model, candidates) or candidates
    return max(candidates, key=lambda n: sum(p.numel() for p in lists[n].parameters()))


def _of_the_text(model: nn.Module, candidates: Sequence[str]) -> list[str]:
    """Returns the lists in the part of a model that has the configuration of its text, if that is a part of it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if text is config:
        return []
    owners = {n: [model.get_submodule(".".join(n.split(".")[:i])) for i in range(n.count(".") + 1)] for n in candidates}
    return [n for n, above in owners.items() if any(type(getattr(o, "config", None)) is type(text) for o in above)]


def _configured_depth(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
