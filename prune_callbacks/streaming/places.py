"""Maps the weights of a model to the tensors of its checkpoint, with the conversions that transformers applies."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from prune_callbacks.anatomy.names import names_by_tensor
from prune_callbacks.storage.model_folder import unread
from prune_callbacks.streaming.source import CheckpointFolder


@dataclass(frozen=True, eq=False)
class Conversion:
    """
    A conversion from checkpoint tensors to model weights, where the two are not one to one: experts, in most cases.

    Attributes:
        converter: the converter of transformers.
        name: name of the first converted weight in the model.
        dtype: dtype of the weights.
        keys: pairs of the converter's source pattern and the name of a tensor in the checkpoint.
    """

    converter: WeightConverter
    name: str
    dtype: torch.dtype
    keys: list[tuple[str, str]]

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the converted weights by name; they may share memory with `tensors`, the checkpoint's tensors."""
        converter = deepcopy(self.converter)
        for pattern, key in self.keys:
            converter.add_tensor(self.name, key, pattern, tensors[key].to(self.dtype))  # type: ignore[arg-type]
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


Place = str | Conversion
"""The source of a weight: the name of a tensor in the checkpoint, or a conversion."""


def find_places(model: PreTrainedModel, checkpoint: CheckpointFolder) -> dict[str, Place]:
    """
    Returns the source of every weight of the model, by the rules of `from_pretrained`; of tied weights only the first.

    Records the applied renamings and conversions in the model, as `from_pretrained` does, so that `as_saved` can revert
    them.

    Raises:
        ValueError: a weight is missing from the checkpoint, has another shape, or is quantized; tied weights differ; or
            the checkpoint has other tensors, and its configuration does not name the model's class.
    """
    state = model.state_dict(keep_vars=True)
    found = _found(model, checkpoint, state)
    places: dict[str, Place] = {}
    for names in names_by_tensor(model).values():
        present = [found[name] for name in names if name in found]
        if not present:
            raise ValueError(
                f"{checkpoint.folder} has no {names[0]}, which {type(model).__name__} of its config.json needs; it has "
                f"{len(checkpoint.entries)} tensors, first {min(checkpoint.entries, default='none')}"
            )
        if isinstance(present[0], str):
            _check_entry(checkpoint, present[0], names[0], state[names[0]])
        _check_tied(checkpoint, names, [place for place in present if isinstance(place, str)])
        places[names[0]] = present[0]
    return places


def read_weights(
    checkpoint: CheckpointFolder, model: PreTrainedModel, places: Mapping[str, Place]
) -> dict[str, Tensor]:
    """Returns copies of weights by name; converted weights have the model's dtype, others the checkpoint's."""
    keys = {name: place for name, place in places.items() if isinstance(place, str)}
    read = checkpoint.read(keys.values())
    found = {name: read[key] for name, key in keys.items()}
    for conversion in dict.fromkeys(place for place in places.values() if isinstance(place, Conversion)):
        views = checkpoint.views(key for _, key in conversion.keys)
        on_file = {view.untyped_storage().data_ptr() for view in views.values()}
        for name, weight in conversion.convert(model, views).items():
            found[name] = weight.clone() if weight.untyped_storage().data_ptr() in on_file else weight
    return found


def as_saved(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights as `save_pretrained` writes them, with the names and the layout of the source checkpoint."""
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(weights))
    return saved


def _found(model: PreTrainedModel, checkpoint: CheckpointFolder, state: Mapping[str, Tensor]) -> dict[str, Place]:
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Place] = {}
    conversions: dict[str, Conversion] = {}
    unknown = []
    names = dict(state)
    # transformers sorts by the same key: experts must come in the order of their numbers.
    for key in sorted(checkpoint.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            unknown.append(key)
        elif pattern is None:
            found[name] = key
        else:
            made = conversions.setdefault(name, Conversion(by_pattern[pattern], name, state[name].dtype, []))
            made.keys.append((pattern, key))
    model._weight_conversions = [t for t in transforms if t.was_used()]  # type: ignore[assignment]
    for conversion in conversions.values():
        found |= dict.fromkeys(_check_conversion(conversion, model, checkpoint, state), conversion)
    unknown = unread(model, unknown)
    if unknown:
        what = f"{len(unknown)} tensors of {checkpoint.folder} are no weights of {type(model).__name__}"
        if not checkpoint.config.architectures:
            raise ValueError(
                f"{what}, first {unknown[0]}: config.json does not say of which class the model is. Add the class to "
                'it, such as "architectures": ["LlamaForSequenceClassification"]'
            )
        warnings.warn(f"{what} and are left out, first {unknown[0]}", stacklevel=4)
    return found


def _check_conversion(
    conversion: Conversion, model: PreTrainedModel, checkpoint: CheckpointFolder, state: Mapping[str, Tensor]
) -> list[str]:
    """Returns the names of the converted weights; raises ValueError if they do not match the model."""
    entries = {key: checkpoint.entries[key] for _, key in conversion.keys}
    for key in entries:
        _check_floating(checkpoint, key)
    whose = f"{conversion.name} is made of {len(entries)} tensors of {checkpoint.folder}, first {next(iter(entries))}"
    try:
        made = conversion.convert(model, {k: torch.empty(entry.shape, device="meta") for k, entry in entries.items()})
    except Exception as error:  # transformers' operations define no error type of their own
        raise ValueError(f"{whose}, which do not fit together: one is missing, or has another shape") from error
    for name, tensor in made.items():
        if name not in state or tensor.shape != state[name].shape:
            wanted = tuple(state[name].shape) if name in state else "not part of the model"
            raise ValueError(
                f"{whose}. They make {name} of shape {tuple(tensor.shape)}, and by config.json it is {wanted}: one of "
                "them is missing, or they belong to different models"
            )
    return list(made)


def _check_entry(checkpoint: CheckpointFolder, key: str, name: str, wanted: Tensor) -> None:
    entry = checkpoint.entries[key]
    if entry.shape != tuple(wanted.shape):
        raise ValueError(
            f"{key} in {entry.file} has shape {entry.shape}, and config.json makes {name} of shape "
            f"{tuple(wanted.shape)}: they belong to different models"
        )
    if wanted.is_floating_point():
        _check_floating(checkpoint, key)


def _check_floating(checkpoint: CheckpointFolder, key: str) -> None:
    entry = checkpoint.entries[key]
    if entry.dtype is None or not entry.dtype.is_floating_point:
        raise ValueError(
            f"{key} in {entry.file} is {entry.dtype_name}; quantized weights cannot be pruned: save the model "
            "dequantized"
        )


def _check_tied(checkpoint: CheckpointFolder, names: list[str], present: list[str]) -> None:
    for other in present[1:]:
        pairs = zip(checkpoint.pieces(present[0]), checkpoint.pieces(other), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                f"config.json ties {' and '.join(names)}, and {checkpoint.folder} has different values for them: set "
                '"tie_word_embeddings": false in config.json if they are separate weights'
            )
