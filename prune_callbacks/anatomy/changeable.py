"""Checks that the numbers of weights can be read, and overwritten one by one."""

from collections.abc import Iterable

import torch
from torch import Tensor

from prune_callbacks.anatomy.memory import in_memory, overlapping, plain, repeats_itself
from prune_callbacks.anatomy.names import naming
from prune_callbacks.anatomy.target import Target
from prune_callbacks.parallel.shapes import whole_shape


def check_changeable(target: Target, *, unread: bool = False) -> None:
    """
    Raises ValueError, naming the layer, for a weight that cannot be read and overwritten number by number.

    Args:
        target: the matrix.
        unread: whether the values need not be there: they will be read from files, or a strategy has sharded them.
    """
    with naming(target.name):
        if target.why_no_parameter is not None:
            raise ValueError(target.why_no_parameter)
        _check_values(target.parameter, unread=unread)


def _check_values(weight: Tensor, *, unread: bool) -> None:
    kind = weight.dtype if plain(weight) or weight.layout is not torch.strided else f"a {type(weight).__name__}"
    if weight.is_complex():
        raise ValueError(f"its weight is {kind}; complex weights cannot be pruned, choose other layers with `targets`")
    if not weight.is_floating_point() or weight.element_size() == 1:  # float8 weights need their scales
        raise ValueError(f"its weight is {kind}; quantized weights cannot be pruned, load the model dequantized")
    if weight.layout is not torch.strided:
        raise ValueError(f"its weight is stored as {weight.layout}; convert it back to a dense tensor first")
    if not plain(weight) and not (unread and hasattr(weight, "full_tensor")):  # a DTensor
        raise ValueError(
            f"its weight is {kind}, a tensor that is quantized, sharded or stored in another form of its own; load the "
            "model with ordinary dense weights"
        )
    if weight.is_meta and not unread:
        raise ValueError("its weight is on the meta device, without values; load the model into memory first")
    if not whole_shape(weight).numel():
        raise ValueError(
            f"its weight has shape {tuple(weight.shape)}, so there is nothing to prune; choose other layers with "
            "`targets`"
        )
    if repeats_itself(weight):
        raise ValueError(
            f"its weight of shape {tuple(weight.shape)} is a view in which one number in memory stands for several "
            "weights, which cannot be pruned apart; replace it by a clone: layer.weight = "
            "nn.Parameter(layer.weight.detach().clone(memory_format=torch.contiguous_format))"
        )


def refuse_overlaps(targets: Iterable[Target]) -> None:
    """Raises ValueError for two targets that have some numbers in common in memory, but are not one matrix."""
    here = (target for target in targets if in_memory(target.parameter))
    found = overlapping((target.name, target.stored) for target in here)
    if found is not None:
        raise ValueError(
            f"layers {found[0]} and {found[1]} share a part of their weights in memory, which cannot be pruned apart; "
            "replace one by a clone: layer.weight = nn.Parameter(layer.weight.detach().clone())"
        )
