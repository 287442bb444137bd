"""Padded batches of sequence-to-sequence models: which tokens of the two sequences are real."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prune_callbacks.anatomy.blocks import is_sequence_to_sequence
from prune_callbacks.calibration.batches import Batch, real_tokens

Masks = tuple[Tensor | None, ...]
"""The masks of real tokens, (batch, tokens), of the sequences in a batch; None for one without padding."""


class Pair(dict[str, Any]):
    """
    A padded batch of a sequence-to-sequence model, with sequences of two lengths, by which their layers are told apart.

    Attributes:
        masks: the masks of the encoder's and of the decoder's real tokens.
    """

    masks: Masks


def masks_of(batch: Batch) -> Masks:
    """Returns the masks of a batch's sequences; () if all tokens are real."""
    if isinstance(batch, Pair):
        return batch.masks
    mask = real_tokens(batch)
    return () if mask is None else (mask,)


def told_apart(model: nn.Module, batch: Batch) -> Batch:
    """
    Returns a padded batch of a sequence-to-sequence model as a `Pair`; any other batch as it is.

    An input belongs to the encoder or to the decoder by its length. Where both sequences have one length, the encoder's
    gets one more place of padding, which no layer counts and no attention sees.

    Raises:
        ValueError: the length of the encoder's sequence is not known, and may be that of the decoder's.
    """
    if not is_sequence_to_sequence(model) or not isinstance(batch, Mapping):
        return batch
    source = next((batch[key] for key in ("input_ids", "inputs_embeds") if isinstance(batch.get(key), Tensor)), None)
    encoder, decoder = _mask(batch.get("attention_mask")), _decoder_mask(batch)
    if all(mask is None or bool(mask.all()) for mask in (encoder, decoder)):
        return batch
    pair = Pair(batch)
    if source is None:  # features, of which the encoder makes a sequence of its own length
        sizes = {size for value in batch.values() if isinstance(value, Tensor) for size in value.shape[1:]}
        if decoder is not None and decoder.shape[1] in {-(-size // by) for size in sizes for by in (2, 4)}:
            raise ValueError(
                f"a calibration batch of {type(model).__name__} has padding, and its decoder's {decoder.shape[1]} "
                "tokens may be as many as the places of its encoder, which then cannot be told apart; give labels of "
                "another length, or without padding"
            )
        pair.masks = (decoder, None)
        return pair
    encoder = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device) if encoder is None else encoder
    if decoder is not None and decoder.shape == encoder.shape:
        extra = (0, 1) if source.ndim == 2 else (0, 0, 0, 1)
        key = "input_ids" if source.ndim == 2 else "inputs_embeds"
        pair[key], encoder = functional.pad(source, extra), functional.pad(encoder, (0, 1))
    pair["attention_mask"] = encoder.long()
    pair.masks = (encoder, decoder) if decoder is not None else (encoder, None)
    return pair


def _mask(value: Any) -> Tensor | None:
    return value != 0 if isinstance(value, Tensor) and value.ndim == 2 else None


def _decoder_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Returns which tokens of the decoder are real: those of its mask, and those that a label says something about."""
    mask, labels = _mask(batch.get("decoder_attention_mask")), batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return labels != -100 if mask is None else mask & (labels != -100)
    return mask
