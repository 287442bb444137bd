"""CSR weights: sparse linear layers for CPUs, and their bytes."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.targets import find_targets, sparse_experts
from prune_callbacks.results import Result

DTYPES = (torch.float32, torch.float64)
"""Dtypes in which torch multiplies CSR matrices on a CPU; half precision is not implemented."""

INDEX_BYTES = 4

EXPERTS = "it holds the weights of several layers (experts) in one tensor, and CSR takes linear layers only"


class CSRLinear(nn.Linear):
    """
    An `nn.Linear` whose weight (out, in) is a CSR tensor with int32 indices; equivalent to the dense layer to rounding.

    Computes `weight @ x^T` directly: `nn.functional.linear` accepts a CSR weight too, but is several times slower for
    more than one token, and fails in `torch.inference_mode`. For a single token uses the matrix-vector product.
    """

    trainable = False
    """Whether the dense weight required gradients."""

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Returns `x @ weight.T + bias`."""
        rows = x.reshape(-1, self.in_features)
        product = (self.weight @ rows[0])[None] if len(rows) == 1 else (self.weight @ rows.T).T.contiguous()
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> "CSRLinear":
        # torch's deepcopy of a parameter requests a memory format that CSR tensors do not support.
        memo[id(self.weight)] = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        twin = CSRLinear.__new__(CSRLinear)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


@dataclass(frozen=True)
class CSRReport(Result):
    """
    The bytes of the weights before and after a conversion to CSR.

    Attributes:
        dense_bytes: bytes of the converted weights before.
        csr_bytes: their bytes after: values, column indices and row offsets.
        sparsity: the fraction of zeros in them.
        break_even_sparsity: the sparsity above which CSR takes fewer bytes, if all layers have the same sparsity.
        layers: (dense bytes, CSR bytes) of every converted layer, by name.
        skipped: reasons why layers stay dense, by name.
    """

    dense_bytes: int
    csr_bytes: int
    sparsity: float
    break_even_sparsity: float
    layers: dict[str, tuple[int, int]]
    skipped: dict[str, str]


def break_even_sparsity(shapes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> float:
    """
    Computes the sparsity at which CSR and dense weights of these shapes (out, in) take the same bytes.

    A dense weight takes v bytes (4 in float32). CSR takes v + 4 bytes for each non-zero and 4 bytes for each of the
    `out + 1` row offsets. In float32 the break-even sparsity is 50 % plus half a weight per row.

    Args:
        shapes: shapes (out, in) of all layers.
        dtype: dtype of the values; indices are int32.

    Returns:
        the fraction of zeros.
    """
    size = dtype.itemsize
    weights = sum(out * inputs for out, inputs in shapes)
    offsets = sum(INDEX_BYTES * (out + 1) for out, _ in shapes)
    return 1 - (size * weights - offsets) / ((size + INDEX_BYTES) * weights)


def convert_to_csr_(
    model: nn.Module, *, targets: Sequence[str] | str | None = None, blocks: str | None = None
) -> CSRReport:
    """
    Converts linear layers of a model to `CSRLinear`, in place, for inference on a CPU; `revert_csr_` undoes it.

    Layers stay the same objects, with their names, hooks and biases. Weights become new parameters (out, in) without
    gradients. Save the model first: `save_pretrained` does not support CSR tensors. GPT-2's `Conv1D`, shared weights,
    subclasses of `nn.Linear` and sparse experts in one tensor stay dense and are named in the report.

    Args:
        model: a causal language model on the CPU, float32 or float64.
        targets: patterns of layer names, as for pruning; None for all linear layers of the decoder blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.

    Returns:
        bytes before and after, and the layers that stay dense.

    Raises:
        ValueError: a layer is on another device or in half precision, no layer matches, or all are skipped. The model
            is then unchanged.
    """
    layers = {
        name: target.module
        for name, target in find_targets(find_blocks(model, blocks), targets).items()
        if not isinstance(target.module, CSRLinear)
    }
    experts = dict.fromkeys(sparse_experts(find_blocks(model, blocks), targets), EXPERTS)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    skipped: dict[str, str] = {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        if type(layer) is not nn.Linear:
            skipped[name] = f"it is a {type(layer).__name__}, not an nn.Linear"
        elif owners[id(weight)] > 1:
            skipped[name] = "another module shares its weight"
        else:
            _refuse_unserved(name, weight)
    chosen = {name: cast(nn.Linear, layer) for name, layer in layers.items() if name not in skipped}
    if not chosen:
        raise ValueError(f"no layer can be converted to CSR: {skipped | experts or 'all targets are CSR already'}")
    shapes = [(layer.out_features, layer.in_features) for layer in chosen.values()]
    dtype = next(iter(chosen.values())).weight.dtype
    sizes = {name: _convert(layer) for name, layer in chosen.items()}
    total = sum(math.prod(shape) for shape in shapes)
    kept = sum(int(layer.weight._nnz()) for layer in chosen.values())
    report = CSRReport(
        dense_bytes=sum(dense for dense, _ in sizes.values()),
        csr_bytes=sum(csr for _, csr in sizes.values()),
        sparsity=1 - kept / total,
        break_even_sparsity=break_even_sparsity(shapes, dtype),
        layers=sizes,
        skipped=skipped | experts,
    )
    if report.csr_bytes > report.dense_bytes:
        warnings.warn(
            f"CSR takes {report.csr_bytes / report.dense_bytes:.2f} times the bytes of these weights, which have "
            f"{report.sparsity:.1%} zeros; it takes fewer bytes than dense above {report.break_even_sparsity:.1%}",
            stacklevel=2,
        )
    return report


def _refuse_unserved(name: str, weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise ValueError(
            f"layer {name} is on {weight.device}: CSR weights are for CPUs. On a GPU prune to 2:4 and use "
            "prune_callbacks.deploy.semi_structured.convert_, or move the model with model.cpu()"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"layer {name} is {weight.dtype}: torch multiplies CSR matrices on a CPU in float32 and float64 only; "
            "convert the model with model.float()"
        )


def _convert(layer: nn.Linear) -> tuple[int, int]:
    dense, layer.weight = layer.weight, nn.Parameter(compressed(layer.weight.detach()), requires_grad=False)
    layer.__class__ = CSRLinear
    cast(CSRLinear, layer).trainable = dense.requires_grad
    return dense.nbytes, csr_bytes(layer.weight)


def revert_csr_(model: nn.Module) -> None:
    """Converts every `CSRLinear` back to a dense `nn.Linear`, in place and bit for bit, except that -0 becomes 0."""
    for layer in model.modules():
        if isinstance(layer, CSRLinear):
            layer.weight = nn.Parameter(layer.weight.detach().to_dense(), requires_grad=layer.trainable)
            del layer.trainable
            linear: nn.Linear = layer
            linear.__class__ = nn.Linear


def compressed(weight: Tensor) -> Tensor:
    """Returns a weight (out, in) as CSR with int32 indices, which MKL needs; torch's default is int64."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        wide = weight.to_sparse_csr()
        crow, col = wide.crow_indices().int(), wide.col_indices().int()
        return torch.sparse_csr_tensor(crow, col, wide.values(), size=wide.shape, check_invariants=False)


def csr_bytes(weight: Tensor) -> int:
    """Returns the bytes of a CSR tensor: values, column indices and row offsets."""
    return weight.values().nbytes + weight.col_indices().nbytes + weight.crow_indices().nbytes
