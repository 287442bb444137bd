"""Weights that share memory with each other, or that hold one number in several places."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor


def in_memory(tensor: Tensor) -> bool:
    """Returns whether a tensor's numbers lie in memory as they are, neither packed nor sharded nor without values."""
    return plain(tensor) and not tensor.is_meta and tensor.numel() > 0


def plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is a dense one of torch, without arithmetic of its own as quantized and sharded ones."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout is torch.strided


def repeats_itself(tensor: Tensor) -> bool:
    """Returns whether several entries of a tensor may be one number in memory, as in an expanded view."""
    reach = 0
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def overlapping(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """Returns the names of two tensors, all `in_memory`, that have a number in common there; None if there are none."""
    by_storage: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for name, tensor in named:
        first = int(tensor.storage_offset())
        reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        views = by_storage.setdefault(tensor.untyped_storage().data_ptr(), [])
        views.append((first, first + int(reach), name, tensor))
    for views in by_storage.values():
        views.sort(key=lambda view: view[:2])
        if any(before[1] >= after[0] for before, after in pairwise(views)):
            # Views whose ranges overlap may still be disjoint, such as columns of one matrix.
            owners = torch.full((max(last for _, last, _, _ in views) + 1 - views[0][0],), -1, dtype=torch.int32)
            for number, (first, _, name, tensor) in enumerate(views):
                here = owners.as_strided(tensor.shape, tensor.stride(), first - views[0][0])
                if (other := int(here.max())) >= 0:
                    return views[other][2], name
                here.fill_(number)
    return None
