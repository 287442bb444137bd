"""Writes a sparse model and its masks into a folder that every tool can read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prune_callbacks.anatomy.adapters import base_state_dict
from prune_callbacks.anatomy.computed import computed_tensors
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.model_card import write_model_card
from prune_callbacks.writing import replaced_folder, whole_file

MASKS = "masks.safetensors"
PLAIN = "model.safetensors"
"""The file of a module that is no model of `transformers`."""


def savable(model: nn.Module) -> PreTrainedModel:
    """
    Returns the model if it is one of `transformers` whose files can be loaded again.

    Raises:
        ValueError: it is no `transformers` model, or `check_savable` refuses it.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"only transformers models can be saved, got {type(model).__name__}; save its state_dict instead"
        )
    check_savable(model)
    return model


def check_savable(model: nn.Module) -> None:
    """
    Raises ValueError if a model could not be loaded from the files that `save_sparse_model` writes.

    One of its tensors is computed from others, which have names in files that no model is loaded from, or its
    `state_dict` has values that are no tensors.
    """
    for name, why in computed_tensors(model).items():
        layer = name.rpartition(".")[0]
        raise ValueError(f"the model could not be loaded from its files, because of layer {layer}: {why}")
    if isinstance(model, PreTrainedModel):
        return
    others = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"the state_dict of {type(model).__name__} has values that are no tensors, first {others[0]}, which no "
            "safetensors file can hold; keep them out of it (get_extra_state)"
        )


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """
    Returns the class of the model that a configuration belongs to: the first in its `architectures`.

    Without `architectures` it is the causal LM of the configuration's type. No code from a model's folder is run.

    Raises:
        ValueError: the installed `transformers` has no such class, or the class is for other configurations.
    """
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())  # also has classes that a user has registered
    known = {kind.__name__: kind for kind in (causal if isinstance(causal, tuple) else (causal,))}
    named = next(iter(config.architectures or known), None)
    kind = known.get(named) or getattr(transformers, named or "", None)
    has = f"transformers {transformers.__version__} does not have"
    if named is None:
        raise ValueError(
            f"the model's configuration names no class in `architectures`, and {has} a causal language model for "
            f"{type(config).__name__}; add the class's name to config.json"
        )
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        code = ", and the code that comes with the model (auto_map) is not run" if hasattr(config, "auto_map") else ""
        raise ValueError(
            f"the model's configuration names the class {named} in `architectures`, which {has}{code}; install a "
            "version that has it, or save the model with a class of transformers"
        )
    wanted = kind.config_class or PretrainedConfig
    if named not in known and not isinstance(_config_for(kind, config), wanted):  # InternLM3 is a Llama, mapped so
        raise ValueError(
            f"the model's configuration names the class {named} in `architectures`, which takes {wanted.__name__}, and "
            f"its model_type is {config.model_type!r}; correct one of the two in config.json"
        )
    return kind


def _config_for(kind: Any, config: PretrainedConfig) -> PretrainedConfig:
    """Returns the configuration that a class takes: of a model with text and images it may be the text's alone."""
    text = config.sub_configs.get("text_config")
    return config.get_text_config() if text is not None and text is kind.config_class else config


def empty_model(config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
    """Builds the model of a configuration on the meta device, without values; see `model_class`."""
    kind: Any = model_class(config)
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(_config_for(kind, config), **settings)
    return model


def unread(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Returns the names that are no weights of a model; leaves out those that `from_pretrained` ignores silently."""
    known = model.state_dict()
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return [name for name in names if name not in known and not any(re.search(part, name) for part in ignored)]


def save_sparse_model(
    model: nn.Module,
    masks: MaskSet,
    dirpath: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """
    Writes the model, dense with zeros, and its card into `dirpath/model`, and `dirpath/masks.safetensors`.

    A model of `transformers` is written by `save_pretrained`; if it has adapters (peft), the base model is, under its
    own names. Of any other module the `state_dict` is written as `model.safetensors`, without code, as
    `safetensors.torch.save_model` would: `safetensors.torch.load_model(module, file)` loads it. Older files are
    replaced only once the new ones are complete.

    Args:
        model: the model.
        masks: the model's masks.
        dirpath: the folder.
        tokenizer: saved alongside the model.
        state_dict: the model's whole weights by name, if its parameters are sharded; None: `model.state_dict()`.

    Raises:
        ValueError: the model cannot be saved; see `check_savable`.
    """
    check_savable(model)
    folder = Path(dirpath)
    state = model.state_dict() if state_dict is None else state_dict
    with whole_file(folder / MASKS) as masks_file, replaced_folder(folder / "model") as partial:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(partial, state_dict=base_state_dict(model, state))
        else:
            _save_plain(state, partial)
        write_beside(model, masks, partial, tokenizer)
        masks.save(masks_file)


def write_beside(
    model: nn.Module, masks: MaskSet, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes what lies beside a sparse model's weights: the model card, and the tokenizer if there is one."""
    known = isinstance(model, PreTrainedModel)
    about = {"source": getattr(model.config, "_name_or_path", None)} if known else {"module": type(model).__name__}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_model_card(folder, masks.sparsity(), len(masks), **about)


def _save_plain(state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes a state dict; tied tensors once, with their other names in the metadata."""
    kept: dict[Any, str] = {}
    metadata = {"format": "pt"}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if kept.setdefault(place, name) != name:
            metadata[name] = kept[place]
    # Copies: layers may share one memory without being tied, as recurrent ones do on a GPU.
    whole = {name: state[name].contiguous().clone() for name in kept.values()}
    save_file(whole, folder / PLAIN, metadata=metadata)


def from_state(kind: type[PreTrainedModel], config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Makes a model on the CPU from a whole state dict; ValueError if a weight is missing, left over or misshapen."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "auto"
    load = cast(Any, kind).from_pretrained
    how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(None, config=config, state_dict=dict(state), **how)
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ValueError(f"{kind.__name__} of this configuration does not fit the weights, first {wrong[0]}")
    loaded: PreTrainedModel = model
    for name, parameter in loaded.named_parameters():  # they may have several dtypes
        if name in state and parameter.dtype != state[name].dtype:
            parameter.data = state[name].to(parameter.device)
    return loaded
