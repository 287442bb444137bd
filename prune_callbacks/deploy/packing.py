"""Packs sparse and quantized weights without their zeros: values and positions. All functions round-trip exactly."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Int8, Shaped, UInt8
from torch import Tensor

from prune_callbacks.sparsity import NM


def pack_bits(numbers: Shaped[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Packs integers from 0 to `2^bits - 1`, flattened, with `bits` bits each, the most significant bit first."""
    places = torch.arange(bits - 1, -1, -1)
    spread = (numbers.flatten().cpu()[:, None].to(torch.int32) >> places) & 1
    return torch.from_numpy(np.packbits(spread.to(torch.uint8).numpy().reshape(-1)))


def unpack_bits(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Shaped[Tensor, " count"]:
    """Returns `count` packed integers as int64; the inverse of `pack_bits`."""
    spread = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(spread).long() @ (1 << torch.arange(bits - 1, -1, -1))


def pack_nm(
    weight: Shaped[Tensor, "out in"], pattern: NM
) -> tuple[Shaped[Tensor, "out kept"], UInt8[Tensor, " bytes"]]:
    """
    Packs the `n` kept values of every group of `m`, and their positions in the group.

    A position takes `ceil(log2 m)` bits: 2 for 2:4. A group with fewer than `n` non-zero weights is filled up with its
    zeros at the lowest positions.

    Args:
        weight: the weight (out, in), of any dtype.
        pattern: the pattern n:m along the input.

    Returns:
        the kept values (out, in * n / m), and the packed positions.

    Raises:
        ValueError: the weight does not have the pattern; the error gives the number of groups that violate it.
    """
    pattern.check_shape((weight.shape[0], weight.shape[1]))
    groups = weight.unflatten(1, (-1, pattern.m))
    wrong = int(((groups != 0).sum(-1) > pattern.n).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {groups[..., 0].numel()} groups keep more than {pattern.n} of {pattern.m} weights"
        )
    # The stable sort puts non-zeros first, then zeros by position; the second sort restores the order of positions.
    places = (groups == 0).to(torch.int8).sort(dim=-1, stable=True).indices[..., : pattern.n].sort(dim=-1).values
    return groups.gather(-1, places).flatten(1), pack_bits(places, _place_bits(pattern))


def unpack_nm(
    values: Shaped[Tensor, "out kept"], places: UInt8[Tensor, " bytes"], pattern: NM
) -> Shaped[Tensor, "out in"]:
    """Returns the weight (out, in) with its zeros; the inverse of `pack_nm`."""
    kept = values.unflatten(1, (-1, pattern.n))
    where = unpack_bits(places, _place_bits(pattern), values.numel()).view(kept.shape)
    weight = values.new_zeros(*kept.shape[:2], pattern.m)
    return weight.scatter_(-1, where, kept).flatten(1)


def _place_bits(pattern: NM) -> int:
    return math.ceil(math.log2(pattern.m))


def pack_kept(
    weight: Shaped[Tensor, "out in"], keep: Bool[Tensor, "out in"]
) -> tuple[Shaped[Tensor, " kept"], UInt8[Tensor, " bytes"]]:
    """
    Packs the kept values, row by row, and the mask, with one bit per weight.

    Raises:
        ValueError: a removed weight is not zero.
    """
    wrong = int((weight * ~keep).count_nonzero())
    if wrong:
        raise ValueError(f"{wrong} weights that the mask removes are not zero")
    return weight[keep], pack_bits(keep, 1)


def unpack_kept(
    values: Shaped[Tensor, " kept"], mask: UInt8[Tensor, " bytes"], shape: tuple[int, int]
) -> Shaped[Tensor, "out in"]:
    """Returns the weight (out, in) with its zeros; the inverse of `pack_kept`."""
    keep = unpack_bits(mask, 1, math.prod(shape)).bool().view(shape)
    weight = values.new_zeros(shape)
    weight[keep] = values
    return weight


def pack_codes(codes: Int8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Packs signed integer codes, flattened, with `bits` bits each in two's complement."""
    return pack_bits(codes.to(torch.int32) & (2**bits - 1), bits)


def unpack_codes(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Int8[Tensor, " count"]:
    """Returns `count` signed codes as int8; the inverse of `pack_codes`."""
    numbers = unpack_bits(packed, bits, count)
    return (numbers - ((numbers >> (bits - 1)) << bits)).to(torch.int8)
