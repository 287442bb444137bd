"""Configurations of models with fewer channels and heads, and whether `transformers` accepts them."""

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

CHANNELS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What a configuration calls the number of channels of its MLPs."""


def smaller_configuration(
    model: PreTrainedModel, channels: int | None = None, heads: tuple[int, int] | None = None, width: int | None = None
) -> Any:
    """
    A copy of the model's configuration with fewer channels or heads.

    Args:
        model: its configuration stays as it is.
        channels: of every MLP; None: as they are.
        heads: of queries, and of keys and values; None: as they are.
        width: features of a head.

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
        text.head_dim = width  # else many configurations divide the hidden size by the number of heads
        text.num_attention_heads, text.num_key_value_heads = heads
    try:
        text.validate()
    except StrictDataclassError as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ValueError(f"{type(text).__name__} does not accept {heads or channels}: {reason}") from error
    return config


def serves_heads(model: PreTrainedModel, layer: str, heads: tuple[int, int], width: int) -> bool:
    """Whether a model of fewer heads can be built, so that `layer`, of queries, has as many rows."""
    try:
        config = smaller_configuration(model, heads=heads, width=width)
        with torch.device("meta"):
            smaller = type(model)(config)
    except ValueError:
        return False
    return smaller.get_submodule(layer).get_parameter("weight").shape[0] == heads[0] * width
