"""Converts 2:4 weights to torch's semi-structured tensors, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from prune_callbacks.deploy.backends import SEARCH_TOKENS, TENSORS, Backend, Hardware, choose_backend, why_not
from prune_callbacks.deploy.conversion import Conversion, StandIn, convert_layers_, find_two_four, is_converted

TRAINED = "weight_was_trained"
"""The attribute of a converted `nn.Linear` that holds `requires_grad` of its dense weight."""


@dataclass(frozen=True)
class SemiStructured:
    """The `Form` with a `torch.sparse.SparseSemiStructuredTensor` of the same dtype in the same `nn.Linear`."""

    backend: Backend

    def refusal(self, weight: Tensor) -> str | None:
        return why_not(weight.shape, weight.dtype, self.backend)

    def tolerance(self, dtype: torch.dtype) -> float:
        # The same products summed in another order: each output is rounded by at most half an eps.
        return 2 * torch.finfo(dtype).eps

    def made(self, layer: nn.Linear) -> nn.Linear:
        weight = layer.weight.detach().contiguous()
        sparse = compress(weight, layer.bias, self.backend)
        if not torch.equal(_dense(sparse), weight):
            raise RuntimeError("its 2:4 tensor does not give the weight back")
        made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(sparse, requires_grad=False)
        made.bias = layer.bias
        return made

    def nbytes(self, made: nn.Module) -> int:
        weight: Any = made.get_parameter("weight")
        return sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])

    def install(self, model: nn.Module, name: str, made: nn.Module) -> None:
        layer = model.get_submodule(name)
        setattr(layer, TRAINED, layer.get_parameter("weight").requires_grad)
        layer.weight = made.get_parameter("weight")


def compress(weight: Tensor, bias: Tensor | None, backend: Backend) -> Tensor:
    """Returns a backend's 2:4 tensor; for cuSPARSELt with the fastest algorithm for `SEARCH_TOKENS` tokens."""
    sparse = TENSORS[backend].from_dense(weight)
    if backend == "cusparselt":
        x = weight.new_zeros(SEARCH_TOKENS, weight.shape[1])
        assert sparse.packed is not None
        # torch's linear calls it in the same way: inputs and outputs are transposed.
        found = torch._cslt_sparse_mm_search(sparse.packed, x.t(), bias=bias, transpose_result=True)
        sparse.alg_id_cusparselt = found
    return sparse


def _dense(sparse: Any) -> Tensor:
    """Returns the dense weight; uses the default algorithm, since the one that was found is for other sizes."""
    plain = sparse.detach()
    plain.alg_id_cusparselt = 0
    dense: Tensor = plain.to_dense()
    return dense


def convert_(
    model: nn.Module,
    *,
    targets: Sequence[str] | str | None = None,
    blocks: str | None = None,
    verify: bool = True,
    progress: bool = True,
) -> Conversion:
    """
    Converts every 2:4 weight of a model to a `torch.sparse.SparseSemiStructuredTensor`, in place, for inference.

    Layers and parameters keep their names. `revert_` restores the dense weights, equal in every value. Revert before
    saving, casting, moving or training the model.

    Without a GPU that has kernels, or with the model on the CPU, the model is not changed; a warning and the result
    give the reason. A layer that cannot be converted stays dense and is named in a warning.

    Args:
        model: a causal language model on a CUDA device, in bfloat16 or float16.
        targets: patterns of layer names; None for all linear layers of the decoder blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.
        verify: compare the output of every layer with that of its dense layer, on Gaussian inputs of 64 and of 13
            tokens. A layer stays dense if the norm of the difference exceeds twice the dtype's eps times the norm of
            the output (1.6 % in bfloat16, 0.2 % in float16). The exact recovery of the weights is always checked.
        progress: show a progress bar.

    Returns:
        the converted layers, the reasons why others stay dense, the measured errors, and the bytes.

    Raises:
        ValueError: no layer is 2:4, or some are converted already.
    """
    found = find_two_four(model, targets, blocks)
    choice = choose_backend(Hardware.of(found.device))
    form = None if choice.backend is None else SemiStructured(choice.backend)
    return convert_layers_(model, found, form, choice.reason, verify=verify, progress=progress)


def revert_(model: nn.Module) -> None:
    """
    Reverts `convert_`, `convert_int8_` and `convert_fp8_` in place: restores dense weights and their `requires_grad`.

    Weights equal those before the conversion in every value, except that -0 becomes 0. A model without converted
    layers is not changed.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, StandIn):
            model.set_submodule(name, module.restored())
        elif is_converted(module) or TRAINED in module.__dict__:
            weight = module.get_parameter("weight")
            dense = _dense(weight) if isinstance(weight, SparseSemiStructuredTensor) else weight.detach()
            # After model.cpu() a 2:4 tensor reports the CPU as its device, but its parts are still on the GPU.
            trained = module.__dict__.pop(TRAINED, False)
            module.weight = nn.Parameter(dense.to(weight.device), requires_grad=trained)
