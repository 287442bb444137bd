"""Describes calibration batches: their content and their number of tokens."""

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


def count_tokens(batch: object) -> int:
    """Returns the number of real tokens in a batch of token ids; 0 for a batch of another kind."""
    if isinstance(batch, Mapping):
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        return int(mask.count_nonzero()) if isinstance(mask, Tensor) else count_tokens(ids)
    ids = isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point()
    return batch.numel() if ids and isinstance(batch, Tensor) else 0
