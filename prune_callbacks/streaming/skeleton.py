"""A model on the meta device, whose weights get values and lose them again block by block."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prune_callbacks.anatomy.names import names_by_tensor
from prune_callbacks.storage.model_folder import empty_model
from prune_callbacks.streaming.source import CheckpointFolder


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model of a config in evaluation mode: weights on the meta device, computed buffers on the CPU."""
    model = empty_model(config, dtype=dtype)
    for module in model.modules():
        computed = [n for n, b in module.named_buffers(recurse=False) if n in module._non_persistent_buffers_set]
        for name in computed:
            setattr(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
        if computed:
            module._is_hf_initialized = False  # type: ignore[assignment]
    # As in from_pretrained, for buffers that no file holds (rotary frequencies); has no effect on the meta device.
    model.initialize_weights()  # type: ignore[no-untyped-call]
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = next((d for p, d in model._get_dtype_plan(dtype).items() if _glob(p).search(name)), None)
        if kept is not None:  # some models keep a few weights and buffers in float32 in a 16-bit model
            tensor.data = tensor.data.to(kept)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train(False)
    return model


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", ".*"))


def model_dtype(checkpoint: CheckpointFolder, dtype: str | torch.dtype | None) -> torch.dtype:
    """
    Returns the dtype of the model: `dtype` if given, else that of the configuration, else that of the weights.

    The same rule as in `from_pretrained`. Raises ValueError for a string that does not name a dtype of torch.
    """
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
    """Raises ValueError if a block shares a weight with another module."""
    for names in names_by_tensor(model).values():
        if len(names) > 1 and any(name.startswith(f"{block}.") for name in names for block, _ in blocks):
            raise ValueError(
                f"{' and '.join(names)} are one weight, and blocks that share weights cannot be pruned one at a time; "
                "load the model and use prune_sequentially"
            )


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Sets parameters and buffers of a module to `tensors`, cast to the dtype that they have on the meta device."""
    state = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        holder, empty = module.get_submodule(owner), state[name]
        value = tensor.to(empty.dtype)
        setattr(holder, last, nn.Parameter(value, requires_grad=False) if isinstance(empty, nn.Parameter) else value)


def drop(module: nn.Module, names: Iterable[str]) -> None:
    """Replaces parameters and buffers of a module by empty tensors on the meta device."""
    state = module.state_dict(keep_vars=True)
    fill(module, {name: torch.empty_like(state[name], device="meta") for name in names})
