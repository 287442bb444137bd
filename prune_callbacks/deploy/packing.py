"""Sparse and rounded weights without their zeros: values, and where they stand. Every function round-trips exactly."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Int8, Shaped, UInt8
from torch import Tensor

from prune_callbacks.sparsity import NM


def pack_bits(numbers: Shaped[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Whole numbers from 0 to `2^bits - 1`, flattened, `bits` bits each, the highest bit first."""
    places = torch.arange(bits - 1, -1, -1)
    spread = (numbers.flatten().cpu()[:, None].to(torch.int32) >> places) & 1
    return torch.from_numpy(np.packbits(spread.to(torch.uint8).numpy().reshape(-1)))


def unpack_bits(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Shaped[Tensor, " count"]:
    """The inverse of `pack_bits`, int64."""
    spread = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(spread).long() @ (1 << torch.arange(bits - 1, -1, -1))


def pack_nm(
    weight: Shaped[Tensor, "out in"], pattern: NM
) -> tuple[Shaped[Tensor, "out kept"], UInt8[Tensor, " bytes"]]:
    """
    The `n` values of every group of `m`, and their places in it, `ceil(log2 m)` bits each: 2 for 2:4.

    A group with fewer than n weights that are not zero is filled up with zeros, those of the lowest places.

    Raises:
        ValueError: the weight does not have the pattern; how many groups do not.
    """
    pattern.check_shape((weight.shape[0], weight.shape[1]))
    groups = weight.unflatten(1, (-1, pattern.m))
    wrong = int(((groups != 0).sum(-1) > pattern.n).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {groups[..., 0].numel()} groups keep more than {pattern.n} of {pattern.m} weights"
        )
    # Stable: those that are not zero first, then the lowest places; then in the order they stand in.
    places = (groups == 0).to(torch.int8).sort(dim=-1, stable=True).indices[..., : pattern.n].sort(dim=-1).values
    return groups.gather(-1, places).flatten(1), pack_bits(places, _place_bits(pattern))


def unpack_nm(
    values: Shaped[Tensor, "out kept"], places: UInt8[Tensor, " bytes"], pattern: NM
) -> Shaped[Tensor, "out in"]:
    """The inverse of `pack_nm`: the weight with its zeros."""
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
    The kept values, row after row, and the mask, one bit a weight.

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
    """The inverse of `pack_kept`."""
    keep = unpack_bits(mask, 1, math.prod(shape)).bool().view(shape)
    weight = values.new_zeros(shape)
    weight[keep] = values
    return weight


def pack_codes(codes: Int8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Signed codes of `bits` bits, flattened, two's complement."""
    return pack_bits(codes.to(torch.int32) & (2**bits - 1), bits)


def unpack_codes(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Int8[Tensor, " count"]:
    """The inverse of `pack_codes`."""
    numbers = unpack_bits(packed, bits, count)
    return (numbers - ((numbers >> (bits - 1)) << bits)).to(torch.int8)
