"""Describes calibration batches by their content."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from prune_callbacks.calibration.batches import Batch


def described(batch: Batch) -> str:
    """Returns a hash of the content of a batch, 16 hexadecimal digits."""
    parts = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    digest = hashlib.sha256()
    for name in sorted(parts):
        value = parts[name]
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()[:16]
