"""Files of CSR weights: written from a model or from tensors, and read as tensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prune_callbacks.deploy.csr import CSRLinear
from prune_callbacks.writing import whole_file

METADATA = "prune_callbacks.csr"
"""The metadata key for the shapes of the weights."""


def save_csr(source: nn.Module | Mapping[str, Tensor], path: str | Path) -> int:
    """
    Writes CSR weights to a safetensors file: `NAME.crow`, `NAME.col` and `NAME.values` for each weight.

    Leaves out biases and layers that are not CSR.

    Args:
        source: a model with `CSRLinear` layers, or CSR tensors (out, in) by name.
        path: the file.

    Returns:
        the size of the file in bytes.

    Raises:
        ValueError: `source` has no CSR weight.
    """
    if isinstance(source, nn.Module):
        named = {name: m.weight.detach() for name, m in source.named_modules() if isinstance(m, CSRLinear)}
    else:
        named = {name: weight for name, weight in source.items() if weight.layout is torch.sparse_csr}
    if not named:
        raise ValueError("there are no CSR weights to save; call convert_to_csr_ first")
    parts: dict[str, Tensor] = {}
    for name, weight in named.items():
        parts |= {f"{name}.crow": weight.crow_indices(), f"{name}.col": weight.col_indices()}
        parts[f"{name}.values"] = weight.values()
    shapes = {name: list(weight.shape) for name, weight in named.items()}
    with whole_file(path) as partial:
        save_file(parts, partial, metadata={METADATA: json.dumps(shapes)})
    return Path(path).stat().st_size


def load_csr(path: str | Path) -> dict[str, Tensor]:
    """
    Reads a file that `save_csr` wrote, bit for bit.

    Args:
        path: the file.

    Returns:
        CSR tensors (out, in) by name.

    Raises:
        ValueError: the file is missing, damaged, not a CSR file, or has indices outside of the matrix.
    """
    if not Path(path).is_file():
        raise ValueError(f"no CSR file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA not in metadata:
                raise ValueError(f"{path} is a safetensors file but not one that save_csr wrote")
            loaded: dict[str, Tensor] = {}
            for name, shape in json.loads(metadata[METADATA]).items():
                crow, col, values = (file.get_tensor(f"{name}.{part}") for part in ("crow", "col", "values"))
                loaded[name] = torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=True)
            return loaded
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is not a readable CSR file: {error}") from error
