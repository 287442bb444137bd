"""Keep masks at one bit per weight on the device of their weights, and zeroing by them."""

import sys

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

assert sys.byteorder == "little"

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PackedKeep:
    """
    The packed keep mask of the indices `start` to `stop` (exclusive) of a flattened parameter.

    Args:
        bits: the mask of the whole parameter, as `MaskSet.packed` returns it; not copied if `device` is the CPU.
        start: first index.
        stop: index after the last.
        device: the device of the weights to mask.
    """

    def __init__(self, bits: UInt8[Tensor, " bytes"], start: int, stop: int, device: torch.device) -> None:
        self._bits = bits[start // 8 : -(-stop // 8)].to(device)
        self._skip = start % 8
        self._count = stop - start

    def unpacked(self) -> Bool[Tensor, " count"]:
        """Returns the mask, True = kept, at one byte per weight."""
        if self._bits.device.type == "cpu":  # numpy takes a tenth of the time that torch does
            flat = torch.from_numpy(np.unpackbits(self._bits.numpy()).view(np.bool_))
        else:
            table = _bytes_of_bits(self._bits.device)
            flat = table.index_select(0, self._bits.int()).view(torch.bool)
        return flat[self._skip : self._skip + self._count]


_TABLES: dict[torch.device, Tensor] = {}


def _bytes_of_bits(device: torch.device) -> Tensor:
    """Returns a table of the eight bools packed in each of the 256 bytes, highest bit first, as one int64 per byte."""
    if device not in _TABLES:
        bits = torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)
        _TABLES[device] = (bits & 1).contiguous().view(torch.int64).flatten().to(device)
    return _TABLES[device]


@torch.no_grad()
def zero_removed(tensor: Tensor, keep: Bool[Tensor, " count"]) -> None:
    """
    Sets the values that are not kept to +0.0, in place, including inf and NaN.

    Multiplies the bits as integers: `masked_fill_` takes five times as long on a CPU, and a product of floats would
    leave -0.0 and NaN.
    """
    bits = tensor.detach().view(_INTEGERS[tensor.element_size()])
    bits.mul_(keep.view(tensor.shape))


@torch.no_grad()
def count_removed(tensor: Tensor, keep: Bool[Tensor, " count"]) -> int:
    """Counts the values that are neither kept nor zero."""
    return int((tensor.detach() != 0).logical_and_(~keep.view(tensor.shape)).count_nonzero())
