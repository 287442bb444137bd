"""Saves a sparse model, quantized or not, to a file without its zeros, and loads it bit for bit."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from prune_callbacks.anatomy.adapters import refuse_adapters
from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.anatomy.names import naming
from prune_callbacks.deploy.compression_size import (
    FILE,
    METADATA,
    ROLES,
    Compression,
    measure_compression,
    packed_layout,
)
from prune_callbacks.deploy.packing import pack_codes, pack_kept, pack_nm, unpack_codes, unpack_kept, unpack_nm
from prune_callbacks.solvers.gptq import Grid
from prune_callbacks.sparsity import NM, MaskSet, Pattern
from prune_callbacks.sparsity.questions import kept_of_group
from prune_callbacks.storage.model_folder import empty_model, from_state, model_class, savable
from prune_callbacks.writing import filled_folder


def save_compressed(
    model: nn.Module,
    masks: MaskSet,
    dirpath: str | Path,
    *,
    pattern: Pattern | None = None,
    scales: Mapping[str, Tensor] | None = None,
    grid: Grid | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Compression:
    """
    Writes a folder with `compressed.safetensors`, the configuration and the tokenizer; `load_compressed` reads it.

    An N:M weight is stored as its kept values and their positions in the group, 2 bits each for 2:4. Any other pruned
    weight is stored as its kept values and a mask of one bit a weight. For quantized layers the values are integer
    codes, two to a byte with 4 bits, with float16 scales. The loaded model equals the saved one bit for bit and is
    dense with zeros: the format is for storage and transport.

    Args:
        model: a causal LM of `transformers`, or a module that holds one.
        masks: masks of the layers to pack.
        dirpath: a new or empty folder, or one with an earlier compressed model, which is replaced once the new one is
            complete.
        pattern: if it is `NM`, layers whose mask has the pattern are packed by groups.
        scales: scales of quantized layers, by parameter name: `PruneReport.scales`.
        grid: the grid to which these layers were quantized.
        tokenizer: tokenizer to save with the model.

    Returns:
        The bytes of the file, by part.

    Raises:
        ValueError: a removed weight is not zero, or a weight is not on its grid (the error names the layer); scales and
            grid are not given together; the folder holds other files; or the model has adapters.
    """
    whole, folder = savable(find_language_model(model)), Path(dirpath)
    if scales and grid is None:
        raise ValueError("scales need the grid that they were computed for: save_compressed(..., grid=Grid(bits=4))")
    if grid is not None and not scales:
        raise ValueError(f"{grid} without scales: give scales=report.scales of a pruner that quantizes, or no grid")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FILE).is_file():
        raise ValueError(f"{folder} holds other files, first {min(folder.iterdir()).name}; choose a folder of its own")
    refuse_adapters(whole)
    config = _loadable(whole)
    tensors: dict[str, Tensor] = {}
    layout: dict[str, dict[str, Any]] = {}
    tied = whole.all_tied_weights_keys  # are written once
    state = whole.state_dict()
    for name, tensor in state.items():
        if name in masks:
            layer = whole.get_submodule(name.rpartition(".")[0])
            with naming(name):
                input_first = isinstance(layer, Conv1D) or (tensor.ndim == 3 and getattr(layer, "is_transposed", False))
                weight, keep = _as_matrix(tensor.cpu(), input_first), _as_matrix(masks[name], input_first)
                parts, entry = _pack(weight, keep, pattern, (scales or {}).get(name), grid)
            tensors |= {f"{name}.{role}": part.contiguous() for role, part in parts.items()}
            layout[name] = entry | {"input_first": input_first}
            if tensor.ndim == 3:
                layout[name]["experts"] = len(tensor)
        elif name not in tied or tensor.data_ptr() != state[tied[name]].data_ptr():
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    masks.matching({name: whole.get_parameter(name) for name in layout})  # raises for a mask that was not used
    with filled_folder(folder) as partial:
        save_file(tensors, partial / FILE, metadata={METADATA: json.dumps(layout)})
        config.save_pretrained(partial)
        generation = getattr(whole, "generation_config", None)  # of models that generate text
        if generation is not None:
            generation.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return measure_compression(dirpath)


def _loadable(model: PreTrainedModel) -> PretrainedConfig:
    """Returns the model's configuration with its class; ValueError if `load_compressed` would make another of it."""
    config: PretrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if model_class(config) is not type(model):
        raise ValueError(
            f"load_compressed makes models of the classes of transformers, and {type(model).__module__}."
            f"{type(model).__name__} is none of them; save a model of one of these classes"
        )
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    made = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    wrong = [name for name in {**own, **made} if own.get(name) != made.get(name)]
    if wrong:
        shapes = [tuple(found[wrong[0]]) if wrong[0] in found else "missing" for found in (own, made)]
        raise ValueError(
            f"load_compressed could not make this model of its configuration: {len(wrong)} tensors differ, first "
            f"{wrong[0]}, which is {shapes[0]} in the model and {shapes[1]} by the configuration"
        )
    return config


def _as_matrix(stored: Tensor, input_first: bool) -> Tensor:
    """Returns a weight or mask as (out, in); experts in one tensor are stacked along the rows."""
    return (stored.mT if input_first else stored).reshape(-1, stored.shape[-2 if input_first else -1])


def _pack(
    weight: Tensor, keep: Tensor, pattern: Pattern | None, scale: Tensor | None, grid: Grid | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the packed parts of a weight (out, in), and the entry of the layout that `_unpack` needs."""
    entry: dict[str, Any] = {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    stored = weight
    if scale is not None:
        assert grid is not None
        stored = grid.encode(weight, scale)
        entry |= {"bits": grid.bits, "group_size": grid.group_size}
    group = None if pattern is None else kept_of_group(pattern)
    nm = None if group is None else NM(*group)
    if nm is not None and nm.holds(keep):
        if bool((stored * ~keep).any()):
            raise ValueError("weights that the mask removes are not zero")
        values, indices = pack_nm(stored, nm)
        entry |= {"n": nm.n, "m": nm.m}
    else:
        values, indices = pack_kept(stored, keep)
    parts = {"indices": indices, "values": values}
    if scale is not None:
        assert grid is not None
        entry["count"] = values.numel()
        parts |= {"values": pack_codes(values, grid.bits), "scales": scale.half().cpu()}
    return parts, entry


def _unpack(parts: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    """Returns the weight (out, in) with its zeros; the inverse of `_pack`."""
    (out, size), dtype = entry["shape"], getattr(torch, entry["dtype"])
    values, codes = parts["values"], "bits" in entry
    if codes:
        values = unpack_codes(values, entry["bits"], entry["count"])
    if "m" in entry:
        pattern = NM(entry["n"], entry["m"])
        weight = unpack_nm(values.view(out, size // pattern.m * pattern.n), parts["indices"], pattern)
    else:
        weight = unpack_kept(values, parts["indices"], (out, size))
    return Grid(entry["bits"], entry["group_size"]).decode(weight, parts["scales"], dtype) if codes else weight


def load_compressed(dirpath: str | Path) -> PreTrainedModel:
    """
    Loads a model that `save_compressed` wrote, bit for bit: dense with zeros, on the CPU, in evaluation mode.

    Args:
        dirpath: the folder.

    Raises:
        ValueError: the file does not exist, is damaged, or lacks a weight.
    """
    path = Path(dirpath) / FILE
    layout = packed_layout(path)
    config = AutoConfig.from_pretrained(dirpath, trust_remote_code=False)
    state: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        packed = {f"{name}.{role}" for name in layout for role in ROLES}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            if key not in packed:
                state[key] = file.get_tensor(key)
        for name, entry in layout.items():
            roles = ROLES if "bits" in entry else ROLES[:2]
            weight = _unpack({role: file.get_tensor(f"{name}.{role}") for role in roles}, entry)
            if "experts" in entry:
                weight = weight.unflatten(0, (entry["experts"], -1))
            state[name] = weight.mT.contiguous() if entry["input_first"] else weight
    model = from_state(model_class(config), config, state)
    if (path.parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(dirpath)
    return model
