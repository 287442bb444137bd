"""Checks calibration batches and windows against a model, before anything runs."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.blocks import has_forward, is_sequence_to_sequence
from prune_callbacks.calibration.batches import TARGETS, Batch, OwnStep, accepted_inputs
from prune_callbacks.calibration.pairs import Pair


def check_batches(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Raises ValueError for one tensor, a model without a forward, or a batch that the model cannot take."""
    if isinstance(batches, Tensor):
        raise ValueError(f"batches must be several batches, got one tensor of shape {tuple(batches.shape)}; split it")
    own = [batch for batch in batches if isinstance(batch, OwnStep)]
    if own:
        for step in own if isinstance(model, PreTrainedModel) else ():
            step.note_padding(model)
        return
    if not has_forward(model):
        raise ValueError(
            f"{type(model).__name__} has no forward, and calibration runs it on the batches: define forward, e.g. as "
            "that of the model inside"
        )
    for batch in batches:
        if isinstance(model, PreTrainedModel):
            check_batch(model, batch)
        given: dict[str, Any] = accepted_inputs(model, batch) if isinstance(batch, Mapping) else {}
        try:
            inspect.signature(model.forward).bind(*([] if isinstance(batch, Mapping) else [batch]), **given)
        except TypeError as error:
            keys = f"{sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"a calibration batch does not fit the forward of {type(model).__name__}: {error}. It holds {keys}"
            ) from error


def check_batch(model: PreTrainedModel, batch: Batch) -> None:
    """
    Raises ValueError for a batch that a model of transformers cannot take.

    That is a batch without any input of the model, token ids of a wrong kind or outside of its embeddings, or windows
    longer than its table of positions.
    """
    inputs = accepted_inputs(model, batch)
    main = model.main_input_name
    ids = inputs.get("input_ids")
    embedded = inputs.get("inputs_embeds")
    first = next((inputs[key] for key in ("input_ids", "inputs_embeds", main) if key in inputs), None)
    if "input_ids" in inputs or main == "input_ids":
        wrong = not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point()
        if wrong and not (ids is None and _is_embedded(embedded)):
            keys = sorted(batch) if isinstance(batch, Mapping) else []
            found = keys if ids is None else f"{type(ids).__name__} {tuple(getattr(ids, 'shape', ()))}"
            raise ValueError(
                "a calibration batch must hold input_ids, integers of shape (batch, tokens), or inputs_embeds, "
                f"(batch, tokens, hidden); got {found}"
            )
    if first is None:
        raise ValueError(
            f"a calibration batch must hold {main}, the input of {type(model).__name__}; got "
            f"{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}"
        )
    _check_masks(inputs)
    if not isinstance(batch, Pair):
        _refuse_padded_pairs(model, inputs)
    for key in ("input_ids", "inputs_embeds", "decoder_input_ids"):
        if isinstance(inputs.get(key), Tensor) and inputs[key].ndim > 1:
            check_window_length(model, inputs[key].shape[1], "the calibration windows")
    for key in ("input_ids", "decoder_input_ids"):
        if isinstance(inputs.get(key), Tensor) and inputs[key].ndim == 2:
            check_ids(model, inputs[key])


MASKS = ("attention_mask", "decoder_attention_mask")
DECODER_IDS = ("decoder_input_ids", "decoder_inputs_embeds")


def _check_masks(inputs: Mapping[str, Any]) -> None:
    """Raises ValueError for windows without a token, or a mask that does not say which tokens are real."""
    for key, beside in (("attention_mask", ("input_ids", "inputs_embeds")), ("decoder_attention_mask", DECODER_IDS)):
        mask = inputs.get(key)
        given = next((inputs[name] for name in beside if isinstance(inputs.get(name), Tensor)), None)
        if given is not None and 0 in given.shape[:2]:
            raise ValueError(f"a calibration batch of shape {tuple(given.shape)} holds no token")
        if mask is not None and given is not None:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            if shape != tuple(given.shape[:2]):
                raise ValueError(
                    f"{key} must say for every token whether it is real, a tensor of shape {tuple(given.shape[:2])}; "
                    f"got {shape}. With masks of other kinds padding cannot be told from text"
                )


def _refuse_padded_pairs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError for padding in a batch of a sequence-to-sequence model, whose two sequences have two masks."""
    if not is_sequence_to_sequence(model):
        return
    masks = [inputs[key] != 0 for key in MASKS if inputs.get(key) is not None]
    masks += [inputs[key] != -100 for key in TARGETS if isinstance(inputs.get(key), Tensor)]
    if not all(bool(mask.all()) for mask in masks):
        raise ValueError(
            f"a calibration batch of {type(model).__name__} has padding, and of a sequence-to-sequence model it cannot "
            "be told here to which layers it belongs. Give windows without padding, in attention_mask and labels"
        )


def _is_embedded(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def check_ids(model: PreTrainedModel, ids: Tensor, what: str = "the calibration batches") -> None:
    """Raises ValueError for token ids outside of the model's embeddings, if these are known."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # a custom model whose embeddings transformers cannot find
        return
    if not isinstance(embedding, nn.Embedding) or not ids.numel():
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= embedding.num_embeddings:
        raise ValueError(
            f"{what} have token ids from {lowest} to {highest}, and {type(model).__name__} has "
            f"embeddings for 0 to {embedding.num_embeddings - 1}: they were made by the tokenizer of another model"
        )


def check_window_length(model: nn.Module, tokens: int, what: str) -> None:
    """
    Raises ValueError if windows are longer than a model's table of positions.

    Rotary and relative positions have no table: such models take longer windows than the configuration names.

    Args:
        model: the model that the windows are for.
        tokens: the length of a window.
        what: names the windows in the error.
    """
    positions = _positions(model)
    if positions is None or tokens <= positions or not _has_table(model, positions):
        return
    raise ValueError(
        f"{what} have {tokens} tokens, and {type(model).__name__} has a table of {positions} positions "
        f"(max_position_embeddings): cut the text into windows of at most {positions} tokens (seq_len)"
    )


def _positions(model: nn.Module) -> int | None:
    """Returns the number of positions that a model's configuration names; None if it names none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((value for value in found if isinstance(value, int)), None)


def explain(model: nn.Module, batch: Batch, error: Exception) -> None:
    """
    Raises ValueError in place of an error of the model where the reason is known.

    That is where windows are longer than the configuration says, or where a sequence-to-sequence model gets one
    sequence only.
    """
    positions = _positions(model)
    inputs = accepted_inputs(model, batch)
    if is_sequence_to_sequence(model) and not any(key in inputs for key in ("labels", *DECODER_IDS)):
        raise ValueError(
            f"{type(model).__name__} is a sequence-to-sequence model, and the calibration batches hold nothing for its "
            f"decoder: give labels or decoder_input_ids too. The error: {error}"
        ) from error
    shapes = [inputs[key].shape for key in ("input_ids", "inputs_embeds") if isinstance(inputs.get(key), Tensor)]
    if positions is not None and shapes and len(shapes[0]) > 1 and shapes[0][1] > positions:
        raise ValueError(
            f"the forward of {type(model).__name__} fails on windows of {shapes[0][1]} tokens, and its configuration "
            f"names {positions} positions: cut the text into shorter windows (seq_len). The error: {error}"
        ) from error


MARGIN = 2
"""Rows that a table of positions may have in front of the first: OPT and RoBERTa count from 2."""


def _has_table(model: nn.Module, positions: int) -> bool:
    """Returns whether a model looks its positions up in a table, by an embedding or a tensor of that length."""
    try:
        words = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:
        words = None
    lengths = range(positions, positions + MARGIN + 1)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words and module.num_embeddings in lengths:
            return True
        tables = [
            value for value in (*module.buffers(recurse=False), *vars(module).values()) if isinstance(value, Tensor)
        ]
        if any(t.ndim > 1 and t.shape[0] in lengths and t.is_floating_point() for t in tables):
            return True
    return False
