"""What a training batch says: the model's arguments, their labels, and which tokens are predicted."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from prune_callbacks.calibration.batches import named_arguments

NAMES = '{"input_ids": ids, "attention_mask": mask, "labels": labels}, the last two if there are any'


def model_inputs(batch: Any) -> dict[str, Any]:
    """
    Returns a batch as keyword arguments of a causal LM, with labels, which are -100 where the attention mask is 0.

    Args:
        batch: token ids (batch, tokens); a mapping or named tuple with `input_ids` or `inputs_embeds`, and maybe
            `attention_mask` and `labels`; or a tuple or list that holds one of these alone.

    Raises:
        ValueError: the batch has several parts without names, no token ids, or labels are missing or do not fit.
    """
    if hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, tuple | list) and len(batch) == 1:  # as a TensorDataset of one tensor yields
        return model_inputs(batch[0])
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        parts = f" of {len(batch)} parts" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            f"a batch is a {type(batch).__name__}{parts}, which does not say what is what. Let the dataset or "
            f"collate_fn give names: {NAMES}"
        )
    inputs = {key: value for key, value in batch.items() if value is not None}
    return inputs | {"labels": _labels(inputs, _shape(inputs))}


def predicted(inputs: Mapping[str, Any]) -> Bool[Tensor, "batch predictions"]:
    """Returns which tokens of inputs with labels, from the second on, are predicted: no padding, no label of -100."""
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    known: Tensor = labels != -100
    if mask is not None and mask.shape == labels.shape:
        known = known & (mask != 0)
    return known[:, 1:]


def counted(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, float]:
    """
    Returns inputs with labels to predict, which tokens these are (see `predicted`), and the factor of their loss.

    The factor is 1. Where the inputs predict nothing, the result predicts every token and the factor is 0: so all ranks
    call the same modules in the same order, without which ZeRO-3 waits for ever.
    """
    tokens = predicted(inputs)
    if bool(tokens.any()):
        return dict(inputs), tokens, 1.0
    return {**inputs, "labels": torch.zeros_like(inputs["labels"])}, torch.ones_like(tokens), 0.0


def taken(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs that the forward pass of a model has a name for, if need be in its typed `**kwargs`."""
    if hasattr(model, "get_base_model"):  # peft's wrapper takes what the model in it takes
        model = model.get_base_model()
    names, _ = named_arguments(model.forward)
    if not names & {"input_ids", "inputs_embeds"}:  # a wrapper, such as torch.compile's, does not say what it takes
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in names}


def _shape(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns (batch, tokens); raises ValueError if inputs have neither token ids nor embeddings of that shape."""
    for name, dims, whole in (("input_ids", 2, True), ("inputs_embeds", 3, False)):
        value = inputs.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.ndim != dims or value.is_floating_point() is whole:
            shown = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"the {name} of a batch are {shown}; accepted are input_ids, whole numbers (batch, tokens), and "
                "inputs_embeds, fractions (batch, tokens, width). Let collate_fn stack the rows into one tensor"
            )
        return tuple(value.shape[:2])
    raise ValueError(
        f"a batch has no input_ids and no inputs_embeds; its keys are {', '.join(map(str, inputs)) or 'none'}. "
        f"Accepted is {NAMES}"
    )


def _labels(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    """Returns the labels (batch, tokens): those given or the token ids, and -100 for padding."""
    labels, mask = inputs.get("labels", inputs.get("input_ids")), inputs.get("attention_mask")
    if labels is None:
        raise ValueError(
            f"a batch of inputs_embeds needs labels: token ids {shape}, with -100 for what is not predicted"
        )
    if not isinstance(labels, Tensor) or tuple(labels.shape) != shape:
        shown = tuple(labels.shape) if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise ValueError(f"the labels of a batch are {shown}; accepted is one per token {shape}")
    if mask is not None and mask.shape == labels.shape:
        return labels.masked_fill(mask == 0, -100)
    if mask is not None and "labels" not in inputs:
        raise ValueError(
            f"an attention_mask {tuple(mask.shape)} does not say which of the token ids {shape} are padding; give "
            "labels too, with -100 for padding"
        )
    return labels
