"""Writes a sparse model and its masks into a folder that every tool can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_callbacks.anatomy.adapters import base_state_dict
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.model_card import write_model_card
from prune_callbacks.writing import replaced_folder, whole_file


def savable(model: nn.Module) -> PreTrainedModel:
    """Returns the model; raises ValueError if it is no `transformers` model, which has no common file format."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"only transformers models can be saved, got {type(model).__name__}; save its state_dict instead"
        )
    return model


def save_sparse_model(
    model: nn.Module,
    masks: MaskSet,
    dirpath: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """
    Writes `dirpath/model` (plain `save_pretrained`, dense with zeros), its model card and `dirpath/masks.safetensors`.

    If the model has adapters (peft), the base model is written, under its own names. Older files are replaced only once
    the new ones are complete.

    Args:
        model: a `transformers` model.
        masks: the model's masks.
        dirpath: the folder.
        tokenizer: saved alongside the model.
        state_dict: the model's whole weights by name, if its parameters are sharded; None: `model.state_dict()`.

    Raises:
        ValueError: the model cannot be saved; see `savable`.
    """
    model = savable(model)
    folder = Path(dirpath)
    with whole_file(folder / "masks.safetensors") as masks_file, replaced_folder(folder / "model") as partial:
        model.save_pretrained(
            partial, state_dict=base_state_dict(model, model.state_dict() if state_dict is None else state_dict)
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_model_card(partial, masks.sparsity(), len(masks), source=getattr(model.config, "_name_or_path", None))
        masks.save(masks_file)


def from_state(kind: type[PreTrainedModel], config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Makes a model on the CPU from a whole state dict; ValueError if a weight is missing or has another shape."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "auto"
    load = cast(Any, kind).from_pretrained
    how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(None, config=config, state_dict=dict(state), **how)
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{kind.__name__} of this configuration lacks or does not fit {wrong[0]}")
    loaded: PreTrainedModel = model
    for name, parameter in loaded.named_parameters():  # they may have several dtypes
        if name in state and parameter.dtype != state[name].dtype:
            parameter.data = state[name].to(parameter.device)
    return loaded
