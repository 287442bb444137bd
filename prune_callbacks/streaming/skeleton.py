"""A model without weights, and where in a checkpoint its weights are."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from prune_callbacks.streaming.source import Checkpoint


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration, in evaluation mode: its weights on the meta device, its computed buffers real."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    for module in model.modules():
        computed = [n for n, b in module.named_buffers(recurse=False) if n in module._non_persistent_buffers_set]
        for name in computed:
            setattr(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
        if computed:
            module._is_hf_initialized = False  # type: ignore[assignment]
    # What from_pretrained does for what no file holds (rotary frequencies); on the meta device it does nothing.
    model.initialize_weights()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        kept = next((d for p, d in model._get_dtype_plan(dtype).items() if _glob(p).search(name)), None)
        if kept is not None:  # a few modules stay in float32 where all others are in 16 bits
            parameter.data = parameter.data.to(kept)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train(False)
    return model


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".*"))


def model_dtype(checkpoint: Checkpoint, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype asked for; if none was, the one that `from_pretrained` takes: the configuration's or the weights'."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype is one of torch's, such as 'bfloat16', got {dtype!r}")
        return found
    if dtype is None:
        dtype = checkpoint.config.dtype
    if dtype is None:
        floating = (e.dtype for e in checkpoint.entries.values() if e.dtype is not None and e.dtype.is_floating_point)
        dtype = next(floating, torch.float32)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def find_places(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """
    For every weight of the model its name in the checkpoint, by the rules of `from_pretrained`; of tied ones the first.

    Raises:
        ValueError: the checkpoint lacks a weight, has one of another shape or without values that can be changed, or
            holds weights that transformers makes others of when it loads them.
    """
    state = model.state_dict(keep_vars=True)
    renamed = _renamed(model, checkpoint, state)
    aliases: dict[int, list[str]] = {}
    for name, tensor in state.items():
        aliases.setdefault(id(tensor), []).append(name)
    places: dict[str, str] = {}
    for names in aliases.values():
        present = [renamed[name] for name in names if name in renamed]
        if not present:
            raise ValueError(
                f"{checkpoint.folder} has no {names[0]}, which {type(model).__name__} of its config.json needs; it has "
                f"{len(checkpoint.entries)} tensors, first {min(checkpoint.entries, default='none')}"
            )
        _check_entry(checkpoint, present[0], names[0], state[names[0]])
        _check_tied(checkpoint, names, present)
        places[names[0]] = present[0]
    return places


def _renamed(model: PreTrainedModel, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The checkpoint's names by the model's."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found: dict[str, str] = {}
    unknown = []
    for key in checkpoint.entries:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(state))
        if name not in state and key in state:
            name, converted = key, None
        if converted is not None:
            raise ValueError(
                f"{key} in {checkpoint.folder} is not a weight of {type(model).__name__}: transformers makes {name} of "
                "it and others when it loads them, which is not supported one block at a time. Load the model where "
                "there is memory for it once, save it with save_pretrained(folder, save_original_format=False), and "
                "name that folder"
            )
        if name in state:
            found[name] = key
        else:
            unknown.append(key)
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    unknown = [key for key in unknown if not any(re.search(pattern, key) for pattern in ignored)]
    if unknown:
        warnings.warn(
            f"{len(unknown)} tensors of {checkpoint.folder} are no weights of {type(model).__name__} and are left out, "
            f"first {unknown[0]}",
            stacklevel=4,
        )
    return found


def _check_entry(checkpoint: Checkpoint, key: str, name: str, wanted: Tensor) -> None:
    entry = checkpoint.entries[key]
    if entry.shape != tuple(wanted.shape):
        raise ValueError(
            f"{key} in {entry.file} has shape {entry.shape}, and config.json makes {name} of shape "
            f"{tuple(wanted.shape)}: they are not of one model"
        )
    if wanted.is_floating_point() and (entry.dtype is None or not entry.dtype.is_floating_point):
        raise ValueError(
            f"{key} in {entry.file} is {entry.dtype_name}; quantized weights cannot be pruned, save the model "
            "dequantized"
        )


def _check_tied(checkpoint: Checkpoint, names: list[str], present: list[str]) -> None:
    for other in present[1:]:
        pairs = zip(checkpoint.pieces(present[0]), checkpoint.pieces(other), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                f"config.json ties {' and '.join(names)}, and {checkpoint.folder} has different values for them; say "
                '"tie_word_embeddings": false in config.json if they are two weights'
            )


def refuse_shared(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Raises ValueError if a block has a weight that is also elsewhere."""
    aliases: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(name)
    for names in aliases.values():
        if len(names) > 1 and any(name.startswith(f"{block}.") for name in names for block, _ in blocks):
            raise ValueError(
                f"{' and '.join(names)} are one weight, and blocks that share weights cannot be pruned one at a time; "
                "load the model and use prune_sequentially"
            )


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives parameters and buffers of a module values, in the dtype that they have on the meta device."""
    state = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        holder, empty = module.get_submodule(owner), state[name]
        value = tensor.to(empty.dtype)
        setattr(holder, last, nn.Parameter(value, requires_grad=False) if isinstance(empty, nn.Parameter) else value)


def drop(module: nn.Module, names: Iterable[str]) -> None:
    """Takes the values away again."""
    state = module.state_dict(keep_vars=True)
    fill(module, {name: torch.empty_like(state[name], device="meta") for name in names})
