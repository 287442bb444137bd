"""What needs a whole causal LM and its text: writing further windows, measuring perplexity on given ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.blocks import find_language_model, is_sequence_to_sequence
from prune_callbacks.calibration.batches import Batch, accepted_inputs, device_of, real_tokens
from prune_callbacks.calibration.checks import check_batch

TEXT_KEYS = frozenset({"input_ids", "attention_mask", "position_ids", "cache_position", "use_cache"})
"""Inputs of a batch that holds nothing but text."""


def language_model(who: str, module: nn.Module) -> PreTrainedModel:
    """Returns the causal LM in a module; raises ValueError, naming who asks, if there is none."""
    found = find_language_model(getattr(module, "_orig_mod", module))
    if not isinstance(found, PreTrainedModel) or not found.can_generate() or is_sequence_to_sequence(found):
        raise ValueError(
            f"{who} needs a causal LM of transformers, whose generate() continues token ids; got {type(found).__name__}"
        )
    return found


def texts_of(who: str, model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """Returns the real tokens of every window of a batch; raises ValueError if it holds something else than text."""
    check_batch(model, batch)
    inputs = accepted_inputs(model, batch)
    if "input_ids" not in inputs or not inputs.keys() <= TEXT_KEYS:
        found = sorted(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(f"{who} needs calibration batches of token ids alone; one holds {found}")
    ids, real = inputs["input_ids"].cpu().long(), real_tokens(batch)
    return list(ids) if real is None else [row[keep] for row, keep in zip(ids, real.cpu(), strict=True)]


@contextmanager
def moved(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """
    Moves a whole model to a device and back; None, or parts on several devices: it stays as it is. Yields the device.

    Raises:
        ValueError: the device has too little memory.
    """
    before = device_of(model)
    if device is None or len({parameter.device for parameter in model.parameters()}) > 1:
        yield before
        return
    try:
        try:
            model.to(device)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{type(model).__name__} does not fit on {device}, where all of it must run: use a larger one, or none"
            ) from error
        yield torch.device(device)
    finally:
        model.to(before)
