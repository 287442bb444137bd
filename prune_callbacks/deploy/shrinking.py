"""Removes whole zero rows and columns, which makes the model itself smaller."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.adapters import refuse_adapters
from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.anatomy.coupling import Coupled, find_coupled
from prune_callbacks.anatomy.resized import smaller_configuration
from prune_callbacks.anatomy.target import LayerTarget
from prune_callbacks.storage.model_folder import from_state, savable


@torch.no_grad()
def shrink(model: nn.Module, masks: Mapping[str, Tensor], *, blocks: str | None = None) -> PreTrainedModel:
    """
    Returns a smaller model without the channels and heads whose columns are zero in the layer that reads them.

    Equivalent to the given model: its logits are the same up to the rounding of shorter sums. The result is a plain
    model of the same `transformers` class with its own configuration; it can be saved, loaded and used for generation.
    The given model is not changed.

    Args:
        model: a causal LM of `transformers` (or a module that holds one), pruned by `Structured`.
        masks: its masks, by parameter name; masks of other methods that removed whole columns work too.
        blocks: name of the list of decoder blocks, where it cannot be found.

    Returns:
        the smaller model, with the dtype, the device and the training mode of the given one.

    Raises:
        ValueError: no unit is removed as a whole; a weight of a removed unit is not zero; blocks keep different numbers
            of units, which one configuration cannot express; the configuration does not accept these numbers; or the
            model has adapters that are not merged.
    """
    if not isinstance(masks, Mapping):
        raise ValueError(f"shrink takes masks by parameter name, such as report.masks, got {masks!r}")
    whole = savable(find_language_model(model))
    refuse_adapters(whole)
    coupled = find_coupled(find_blocks(whole, blocks))
    kept = {group: _kept_units(whole, group, masks) for group in coupled}
    if all(bool(units.all()) for units in kept.values()):
        raise ValueError(
            "no channel and no head is zero as a whole, so nothing can be made smaller; Structured(Columns(...)) "
            "removes whole ones"
        )
    config = _smaller_configuration(whole, kept)
    state = {name: tensor.detach().clone() for name, tensor in whole.state_dict().items()}
    for group, units in kept.items():
        features = units.repeat_interleave(group.width)
        _slice(state, whole, group.reader, features, columns=True)
        for writer in group.writers:
            _slice(state, whole, writer, features, columns=False)
    smaller = from_state(type(whole), config, state)
    if getattr(whole, "generation_config", None) is not None:  # of models that generate text
        smaller.generation_config = copy.deepcopy(whole.generation_config)
    nn.Module.to(smaller, next(whole.parameters()).device)
    smaller.train(whole.training)
    return smaller


def _kept_units(model: nn.Module, group: Coupled, masks: Mapping[str, Tensor]) -> Bool[Tensor, " units"]:
    """Returns a mask of the units of which the reader keeps at least one column."""
    reader = LayerTarget.of(group.reader, model.get_submodule(group.reader))
    weight, name = reader.matrix(), reader.parameter_name
    if name not in masks:
        return torch.ones(weight.shape[1] // group.width, dtype=torch.bool)
    read = reader.oriented(masks[name]).any(0)
    if bool(weight[:, ~read.to(weight.device)].any()):
        raise ValueError(f"{group.reader} has weights that are not zero in columns that its mask removes")
    units: Tensor = read.unflatten(0, (-1, group.width)).any(1)
    return units


def _smaller_configuration(model: PreTrainedModel, kept: Mapping[Coupled, Tensor]) -> Any:
    channels = {int(units.sum()): group.reader for group, units in kept.items() if group.width == 1}
    heads = {_heads(group, units): group.reader for group, units in kept.items() if group.width > 1}
    for counts, what in ((channels, "channels"), (heads, "heads")):
        if len(counts) > 1:
            raise ValueError(
                f"blocks keep different numbers of {what}, which one configuration cannot express: "
                + ", ".join(f"{reader} keeps {count}" for count, reader in counts.items())
            )
    width = next((group.width for group in kept if group.width > 1), None)
    return smaller_configuration(model, next(iter(channels), None), next(iter(heads), None), width)


def _heads(group: Coupled, units: Tensor) -> tuple[int, int]:
    """Returns the numbers of kept query heads and of kept key-value heads."""
    left = units.view(group.pools, -1).sum(1)
    if len(set(left.tolist())) > 1:
        raise ValueError(f"{group.reader} keeps {left.tolist()} heads in its groups of queries; they must be equal")
    total = int(units.sum())
    return total, group.pools if group.grouped else total


def _slice(state: dict[str, Tensor], model: nn.Module, layer: str, features: Tensor, *, columns: bool) -> None:
    """Keeps only the given input features of a layer, or the given output rows and their biases."""
    target = LayerTarget.of(layer, model.get_submodule(layer))
    weight = target.oriented(state[f"{layer}.weight"])
    kept = features.to(weight.device)
    state[f"{layer}.weight"] = target.oriented(weight[:, kept] if columns else weight[kept]).contiguous()
    if not columns and f"{layer}.bias" in state:
        state[f"{layer}.bias"] = state[f"{layer}.bias"][kept]


@torch.no_grad()
def logits_difference(model: nn.Module, other: nn.Module, tokens: Int[Tensor, "batch tokens"]) -> float:
    """Returns the largest absolute difference of two models' logits on the same tokens, both in evaluation mode."""
    logits = []
    for one in (model, other):
        training = one.training
        logits.append(one.eval()(tokens.to(next(one.parameters()).device)).logits)
        one.train(training)
    return float((logits[0] - logits[1]).abs().max())


def changed_settings(model: nn.Module, other: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Returns the integers that differ between two models' configurations, as (before, after) by name."""
    before, after = (savable(one).config.get_text_config(decoder=True).to_dict() for one in (model, other))
    names = [name for name, value in after.items() if isinstance(value, int) and value != before.get(name)]
    return {name: (before.get(name), after[name]) for name in names}
