"""Makes configurations with fewer channels and heads, and checks whether `transformers` accepts them."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.coupling import Coupled
from prune_callbacks.anatomy.target import Target
from prune_callbacks.sparsity import Pattern

CHANNELS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""Names that configurations use for the number of channels of their MLPs."""


def smaller_configuration(
    model: PreTrainedModel, channels: int | None = None, heads: tuple[int, int] | None = None, width: int | None = None
) -> Any:
    """
    Returns a copy of the model's configuration with fewer channels or heads.

    Args:
        model: the model; its own configuration is not changed.
        channels: channels of every MLP; None: unchanged.
        heads: the numbers of query heads and of key-value heads; None: unchanged.
        width: features of a head; used with `heads` only.

    Raises:
        ValueError: the configuration has no number of channels, or does not accept these numbers.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    if channels is not None:
        names = [name for name in CHANNELS if hasattr(text, name)]
        if not names:
            raise ValueError(
                f"{type(text).__name__} has none of {', '.join(CHANNELS)} to set the number of channels by"
            )
        setattr(text, names[0], channels)
    if heads is not None:
        text.head_dim = width  # otherwise many configurations divide the hidden size by the number of heads
        text.num_attention_heads, text.num_key_value_heads = heads
    try:
        text.validate()
    except StrictDataclassError as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ValueError(f"{type(text).__name__} does not accept {heads or channels}: {reason}") from error
    return config


def serves_heads(model: PreTrainedModel, layer: str, heads: tuple[int, int], width: int) -> bool:
    """Returns whether a model with so many heads can be built in which `layer`, a `q_proj`, has the matching rows."""
    try:
        config = smaller_configuration(model, heads=heads, width=width)
        with torch.device("meta"):
            smaller = type(model)(config)
    except ValueError:
        return False
    return smaller.get_submodule(layer).get_parameter("weight").shape[0] == heads[0] * width


def planned_removal(
    model: nn.Module,
    coupled: Sequence[Coupled],
    targets: Mapping[str, Target],
    pattern: Pattern,
    asked_of: Callable[[int], int],
) -> dict[str, int]:
    """
    Returns how many units to remove from every pool of coupled layers, by the name of their reader.

    This is the pruner's number, or the largest smaller number of heads that the model supports. Warns, once for all
    layers of the same dimensions, if the number is reduced or zero.

    Args:
        model: the model.
        coupled: its coupled layers.
        targets: the targets, by name; they include all readers.
        pattern: the pruner's pattern, for the warning.
        asked_of: the pruner's number of units to remove from a pool, given the pool's size.
    """
    alike: dict[tuple[int, int, int, bool], list[Coupled]] = {}
    for group in coupled:
        units = targets[group.reader].shape[1] // group.width // group.pools
        alike.setdefault((units, group.width, group.pools, group.grouped), []).append(group)
    plan: dict[str, int] = {}
    for (units, width, pools, grouped), groups in alike.items():
        asked = removed = asked_of(units)
        if width > 1 and isinstance(model, PreTrainedModel):
            while removed and not serves_heads(
                model, groups[0].writers[0], _left(units - removed, pools, grouped), width
            ):
                removed -= 1
        if removed < asked or asked == 0:
            what = "channels" if width == 1 else f"heads of {width} features that may be removed together"
            why = (
                "rounds to none"
                if asked == 0
                else f"would leave a number of heads that {type(model).__name__} cannot have"
            )
            warnings.warn(
                f"{pattern} of {units} {what} {why}: removing {removed} in {len(groups)} layers, first "
                f"{groups[0].reader}",
                stacklevel=3,
            )
        plan |= {group.reader: removed for group in groups}
    return plan


def _left(units: int, pools: int, grouped: bool) -> tuple[int, int]:
    """Returns the remaining numbers of query heads and of key-value heads."""
    return units * pools, pools if grouped else units
