"""A model without weights, which get values and lose them again."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prune_callbacks.streaming.source import CheckpointFolder


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
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = next((d for p, d in model._get_dtype_plan(dtype).items() if _glob(p).search(name)), None)
        if kept is not None:  # a few weights and buffers stay in float32 where all others are in 16 bits
            tensor.data = tensor.data.to(kept)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train(False)
    return model


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".*"))


def model_dtype(checkpoint: CheckpointFolder, dtype: str | torch.dtype | None) -> torch.dtype:
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
