"""2:4 weights in 8 bits: weights and inputs with one scale per row, multiplied by torch's cuSPARSELt kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from prune_callbacks.deploy.backends import SEARCH_TOKENS, Backend, Choice, Hardware, why_not
from prune_callbacks.deploy.conversion import Conversion, StandIn, convert_layers_, find_two_four

TOKENS_MULTIPLE = 16
"""The 8-bit kernels need a multiple of this many tokens; inputs are padded with zeros."""


@dataclass(frozen=True)
class EightBits:
    """
    An 8-bit number format, and the requirements of its kernels.

    Attributes:
        dtype: dtype of the values.
        largest: the value to which a row's largest magnitude is scaled.
        accumulator: dtype in which the kernels sum and return.
        capability: minimum compute capability.
        cusparselt: minimum version of cuSPARSELt (602 for 0.6.2).
        tolerance: relative error that the output of a layer may have on Gaussian inputs.
    """

    dtype: torch.dtype
    largest: float
    accumulator: torch.dtype
    capability: tuple[int, int]
    cusparselt: int
    tolerance: float


INT8 = EightBits(torch.int8, 127.0, torch.int32, (8, 0), 400, 0.05)
# torch's own tests expect compute capability 8.9 to fail.
FP8 = EightBits(torch.float8_e4m3fn, 448.0, torch.float32, (9, 0), 602, 0.08)


def choose_quantized(hardware: Hardware, format: EightBits) -> Choice:
    """Chooses the kernels for a number format on this hardware: cuSPARSELt, or the reason why there are none."""
    name = str(format.dtype).removeprefix("torch.")
    lack = hardware.lacks(format.capability, f"2:4 in {name}")
    if lack is not None:
        return Choice(None, lack)
    if hardware.cusparselt is None or hardware.cusparselt < format.cusparselt:
        found = "none" if hardware.cusparselt is None else f"version {hardware.cusparselt}"
        return Choice(
            None, f"2:4 in {name} needs a torch built with cuSPARSELt {format.cusparselt} or newer, this has {found}"
        )
    return Choice("cusparselt")


def quantize_rows(x: Float[Tensor, "rows n"], format: EightBits) -> tuple[Tensor, Float[Tensor, "rows 1"]]:
    """
    Quantizes every row symmetrically with its own scale, so that `values * scales` approximates `x`.

    The scale is the row's largest magnitude over `format.largest`. Integers are rounded half to even. Zeros stay zero.

    Args:
        x: rows (rows, n) of any floating dtype.
        format: the number format.

    Returns:
        values (rows, n) in the dtype of the format, and float32 scales (rows, 1).
    """
    rows = x.float()
    scale = (rows.abs().amax(1, keepdim=True) / format.largest).clamp_min(torch.finfo(torch.float32).tiny)
    values = (rows / scale).clamp(-format.largest, format.largest)
    return (values if format.dtype.is_floating_point else values.round()).to(format.dtype), scale


@runtime_checkable
class Kernel(Protocol):
    """Kernels for sparse products of 8-bit matrices."""

    def pack(self, weight: Tensor) -> tuple[Tensor, int]:
        """Returns a 2:4 weight (out, in) in the kernel's layout, and the number of its fastest algorithm."""

    def multiply(self, packed: Tensor, x: Tensor, algorithm: int) -> Tensor:
        """Returns `x @ weight.T` (tokens, out) of x (tokens, in) in the accumulator dtype; tokens: a multiple of 16."""


@dataclass(frozen=True)
class CuSparseLt:
    """The cuSPARSELt kernels of torch; see `Kernel`."""

    accumulator: torch.dtype

    def pack(self, weight: Tensor) -> tuple[Tensor, int]:
        packed = torch._cslt_compress(weight)
        x = torch.zeros(SEARCH_TOKENS, weight.shape[1], device=weight.device).to(weight.dtype)
        return packed, torch._cslt_sparse_mm_search(packed, x.t(), out_dtype=self.accumulator)

    def multiply(self, packed: Tensor, x: Tensor, algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(packed, x.t(), out_dtype=self.accumulator, alg_id=algorithm).t()


class QuantizedLinear(StandIn):
    """
    An `nn.Linear` with an 8-bit 2:4 weight, one scale per output row, and inputs quantized per token in `forward`.

    Equivalent to `linear(x', weight', bias)`, where `x'` and `weight'` are `values * scales` of `quantize_rows`.

    Args:
        original: the dense layer; its weight is not changed.
        format: the number format.
        kernel: the kernels that pack the weight and multiply.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, original: nn.Linear, format: EightBits, kernel: Kernel) -> None:
        super().__init__(original)
        values, scale = quantize_rows(original.weight.detach(), format)
        packed, self.algorithm = kernel.pack(values)
        self.format, self.kernel = format, kernel
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes `x` (..., in) per token and returns the output (..., out) in the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        tokens = rows.shape[0]
        values, scale = quantize_rows(functional.pad(rows, (0, 0, 0, -tokens % TOKENS_MULTIPLE)), self.format)
        y = self.kernel.multiply(self.packed, values, self.algorithm)[:tokens].float() * scale[:tokens] * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1).contiguous()


def two_four_name(model: nn.Module) -> str:
    """Returns a name for the 2:4 layers of a model: "2:4", "2:4 int8" or "2:4 float8_e4m3fn"."""
    formats = {layer.format.dtype for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    return " ".join(["2:4", *(str(dtype).removeprefix("torch.") for dtype in formats)])


@dataclass(frozen=True)
class Quantized:
    """The `Form` that converts layers to `QuantizedLinear`."""

    format: EightBits
    kernel: Kernel
    backend: Backend = "cusparselt"

    def refusal(self, weight: Tensor) -> str | None:
        return why_not(weight.shape, self.format.dtype, self.backend)

    def tolerance(self, dtype: torch.dtype) -> float:
        return self.format.tolerance

    def made(self, layer: nn.Linear) -> QuantizedLinear:
        return QuantizedLinear(layer, self.format, self.kernel)

    def nbytes(self, made: nn.Module) -> int:
        return sum(buffer.nbytes for buffer in made.buffers())

    def install(self, model: nn.Module, name: str, made: nn.Module) -> None:
        assert isinstance(made, QuantizedLinear)
        made.put_away()
        model.set_submodule(name, made)


def convert_int8_(
    model: nn.Module,
    *,
    targets: Sequence[str] | str | None = None,
    blocks: str | None = None,
    verify: bool = True,
    progress: bool = True,
) -> Conversion:
    """
    Replaces every layer with a 2:4 weight by a `QuantizedLinear` in int8, in place, for inference.

    Weights get one scale per output row, inputs one per token. cuSPARSELt sums the products exactly, in int32. The
    replaced layers are kept on the CPU, and `revert_` restores them bit for bit. The model may have any floating dtype.
    The arguments are those of `convert_`; the tolerance is 5 % of the output's norm.

    Raises:
        ValueError: no layer is 2:4, or some are converted already.
    """
    return _convert(model, INT8, targets, blocks, verify, progress)


def convert_fp8_(
    model: nn.Module,
    *,
    targets: Sequence[str] | str | None = None,
    blocks: str | None = None,
    verify: bool = True,
    progress: bool = True,
) -> Conversion:
    """
    Replaces every layer with a 2:4 weight by a `QuantizedLinear` in float8 (e4m3), in place, for inference.

    Equivalent to `convert_int8_`, except that products are summed in float32, that the tolerance is 8 % of the output's
    norm, and that compute capability 9.0 and cuSPARSELt 0.6.2 are needed.

    Raises:
        ValueError: no layer is 2:4, or some are converted already.
    """
    return _convert(model, FP8, targets, blocks, verify, progress)


def _convert(
    model: nn.Module,
    format: EightBits,
    targets: Sequence[str] | str | None,
    blocks: str | None,
    verify: bool,
    progress: bool,
) -> Conversion:
    found = find_two_four(model, targets, blocks)
    choice = choose_quantized(Hardware.of(found.device), format)
    form = None if choice.backend is None else Quantized(format, CuSparseLt(format.accumulator))
    return convert_layers_(model, found, form, choice.reason, verify=verify, progress=progress)
