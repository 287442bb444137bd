"""Reaching parameters, gradients and optimizer state under a training strategy."""

from prune_callbacks.parallel.plain import PlainAccess, from_rank_zero, param_access, refuse_unserved
from prune_callbacks.parallel.snapshot import load_snapshot, save_snapshot, snapshot_digest

__all__ = [
    "PlainAccess",
    "from_rank_zero",
    "load_snapshot",
    "param_access",
    "refuse_unserved",
    "save_snapshot",
    "snapshot_digest",
]
