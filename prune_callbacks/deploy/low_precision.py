"""2:4 weights in 8 bits: rows of weights and of inputs with a scale each, multiplied by torch's cuSPARSELt kernels."""

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
"""The 8-bit kernels want a multiple of this many tokens; the rest is padded with zeros."""


@dataclass(frozen=True)
class EightBits:
    """
    An 8-bit number format, and what its kernels need.

    Attributes:
        dtype: of the values.
        largest: the value that a row's largest magnitude is scaled to.
        accumulator: dtype that the kernels sum in and return.
        capability: the least compute capability.
        cusparselt: the least version of cuSPARSELt.
        tolerance: relative error that a layer's output may have, on Gaussian inputs.
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
    """The kernels for a number format on this hardware: cuSPARSELt, new enough, or the reason why there are none."""
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
    Every row on its own symmetric format: values of the format's dtype and float32 scales, `values * scales` about x.

    The scale is the row's largest magnitude over `format.largest`; integers are rounded half to even. Zeros stay zeros.
    """
    rows = x.float()
    scale = (rows.abs().amax(1, keepdim=True) / format.largest).clamp_min(torch.finfo(torch.float32).tiny)
    values = (rows / scale).clamp(-format.largest, format.largest)
    return (values if format.dtype.is_floating_point else values.round()).to(format.dtype), scale


@runtime_checkable
class Kernel(Protocol):
    """Sparse products of 8-bit matrices."""

    def pack(self, weight: Tensor) -> tuple[Tensor, int]:
        """A 2:4 weight (out, in) in the kernel's layout, and the algorithm that serves its products best."""

    def multiply(self, packed: Tensor, x: Tensor, algorithm: int) -> Tensor:
        """`x @ weight.T` (tokens, out) of x (tokens, in), in the accumulator's dtype; tokens in multiples of 16."""


@dataclass(frozen=True)
class CuSparseLt:
    """torch's cuSPARSELt kernels."""

    accumulator: torch.dtype

    def pack(self, weight: Tensor) -> tuple[Tensor, int]:
        packed = torch._cslt_compress(weight)
        x = torch.zeros(SEARCH_TOKENS, weight.shape[1], device=weight.device).to(weight.dtype)
        return packed, torch._cslt_sparse_mm_search(packed, x.t(), out_dtype=self.accumulator)

    def multiply(self, packed: Tensor, x: Tensor, algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(packed, x.t(), out_dtype=self.accumulator, alg_id=algorithm).t()


class QuantizedLinear(StandIn):
    """
    `nn.Linear` with a 2:4 weight in 8 bits, one scale an output row, and inputs quantized as they come, by token.

    Equivalent to `linear(x', weight', bias)` with x' and weight' the values that `quantize_rows` leaves of both.

    Args:
        original: the layer; its weight is read, not changed.
        format: the number format.
        kernel: what packs and multiplies.
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
        rows = x.reshape(-1, x.shape[-1])
        tokens = rows.shape[0]
        values, scale = quantize_rows(functional.pad(rows, (0, 0, 0, -tokens % TOKENS_MULTIPLE)), self.format)
        y = self.kernel.multiply(self.packed, values, self.algorithm)[:tokens].float() * scale[:tokens] * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1).contiguous()


def two_four_name(model: nn.Module) -> str:
    """What the 2:4 layers of a model are to be called beside dense ones: "2:4", "2:4 int8" or "2:4 float8_e4m3fn"."""
    formats = {layer.format.dtype for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    return " ".join(["2:4", *(str(dtype).removeprefix("torch.") for dtype in formats)])


@dataclass(frozen=True)
class Quantized:
    """Layers as `QuantizedLinear`."""

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

    Weights get one scale an output row, inputs one a token; products are summed exactly, in int32, by cuSPARSELt.
    The layers that are replaced wait on the CPU, and `revert_` puts them back as they were, bit for bit. Any floating
    dtype will do. Everything else is as in `convert_`, but for the tolerance: 5 % of the output's norm.

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
    `convert_int8_` in float8 (e4m3), summed in float32: from compute capability 9.0 and cuSPARSELt 0.6.2 on.

    A layer's output may be off by 8 % of its norm.

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
