"""Reaching parameters, gradients and optimizer state under a training strategy."""

from prune_callbacks.parallel.plain import PlainAccess, from_rank_zero, param_access, refuse_unserved
from prune_callbacks.parallel.snapshot import check_snapshot, load_snapshot, save_snapshot

__all__ = [
    "PlainAccess",
    "check_snapshot",
    "from_rank_zero",
    "load_snapshot",
    "param_access",
    "refuse_unserved",
    "save_snapshot",
]
