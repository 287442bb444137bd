"""The choice of kernels for 2:4 weights by hardware, and the weights that each accepts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from prune_callbacks.sparsity import NM

Backend = Literal["cutlass", "cusparselt"]

TENSORS: Mapping[Backend, type[SparseSemiStructuredTensor]] = {
    "cutlass": SparseSemiStructuredTensorCUTLASS,
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
}
SEARCH_TOKENS = 1024
"""Number of tokens in the product on which cuSPARSELt's algorithms are timed."""


@dataclass(frozen=True)
class Hardware:
    """
    The hardware and library versions on which the choice of a backend depends.

    Attributes:
        cuda: whether torch sees an NVIDIA GPU.
        capability: compute capability of the model's device; None on the CPU.
        cusparselt: version of the cuSPARSELt that torch is built with (602 for 0.6.2); None without it.
    """

    cuda: bool
    capability: tuple[int, int] | None
    cusparselt: int | None

    @classmethod
    def of(cls, device: torch.device) -> "Hardware":
        """Returns the hardware for a model on `device`."""
        cuda = torch.cuda.is_available() and torch.version.cuda is not None
        return cls(
            cuda,
            torch.cuda.get_device_capability(device) if cuda and device.type == "cuda" else None,
            torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None,
        )

    def lacks(self, capability: tuple[int, int], what: str) -> str | None:
        """Returns why the model is not on a GPU of at least this capability, which `what` needs; None if it is."""
        if not self.cuda:
            return "torch sees no NVIDIA GPU"
        if self.capability is None:
            return 'the model is on the CPU; move it to the GPU first: model.to("cuda")'
        if self.capability < capability:
            found, least = (".".join(map(str, version)) for version in (self.capability, capability))
            return f"the GPU has compute capability {found}; {what} needs {least} or newer"
        return None


class Choice(NamedTuple):
    """A backend, or the reason why there is none."""

    backend: Backend | None
    reason: str | None = None


def choose_backend(hardware: Hardware) -> Choice:
    """
    Chooses the kernels for 16-bit 2:4 weights on this hardware.

    On compute capability 8.x: CUTLASS, which every CUDA build of torch has. From 9.0 on: cuSPARSELt, because torch's
    CUTLASS kernels support 8.x only.
    """
    lack = hardware.lacks((8, 0), "2:4")
    if lack is not None:
        return Choice(None, lack)
    assert hardware.capability is not None
    if hardware.capability < (9, 0):
        return Choice("cutlass")
    if hardware.cusparselt is None:
        return Choice(None, "from compute capability 9.0 on 2:4 needs cuSPARSELt, and this torch is built without it")
    return Choice("cusparselt")


def why_not(shape: Sequence[int], dtype: torch.dtype, backend: Backend) -> str | None:
    """Returns why a backend does not accept a weight of this shape (out, in) and dtype; None if it does."""
    limits = TENSORS[backend]._DTYPE_SHAPE_CONSTRAINTS
    # CUTLASS lists float32 too, but its sparsity is 1:2 there: 2:4 weights would lose values.
    accepted = [str(known).removeprefix("torch.") for known in limits if known != torch.float32]
    name = str(dtype).removeprefix("torch.")
    if name not in accepted:
        return (
            f"the weight is {name}, and {backend} takes {', '.join(accepted)}: cast the model, as in model.bfloat16()"
        )
    rows, columns = limits[dtype].sparse_min_rows, limits[dtype].sparse_min_cols
    if len(shape) != 2 or 0 in shape or shape[0] % rows or shape[1] % columns:
        return f"the weight is {tuple(shape)}, and {backend} takes {name} in multiples of ({rows}, {columns})"
    return None


def why_not_two_four(weight: Tensor) -> str | None:
    """Returns why a weight (out, in) is not 2:4; None if no group of four along the input keeps more than two."""
    if NM(2, 4).holds(weight != 0):
        return None
    if weight.shape[1] % 4:
        return f"not 2:4: the input size {weight.shape[1]} is not divisible by 4"
    kept = (weight != 0).unflatten(1, (-1, 4)).sum(-1)
    return f"not 2:4: {int((kept > 2).sum()):,} of {kept.numel():,} groups of four keep more than two weights"
