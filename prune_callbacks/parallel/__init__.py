"""Reaching parameters, gradients and optimizer state under a training strategy."""

from prune_callbacks.parallel.access import ParamAccess
from prune_callbacks.parallel.checkpoints import newest_checkpoint
from prune_callbacks.parallel.plain import PlainAccess
from prune_callbacks.parallel.snapshot import check_snapshot, load_snapshot, save_snapshot
from prune_callbacks.parallel.strategies import (
    gathered_state_dict,
    lost_a_process,
    masks_of_zeros,
    param_access,
    refuse_sharded,
    refuse_unserved,
    stepping_optimizers,
    world,
)

__all__ = [
    "ParamAccess",
    "PlainAccess",
    "check_snapshot",
    "gathered_state_dict",
    "load_snapshot",
    "lost_a_process",
    "masks_of_zeros",
    "newest_checkpoint",
    "param_access",
    "refuse_sharded",
    "refuse_unserved",
    "save_snapshot",
    "stepping_optimizers",
    "world",
]
