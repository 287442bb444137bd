"""Reaching parameters, gradients and optimizer state under a training strategy."""

from prune_callbacks.parallel.plain import PlainAccess, from_rank_zero, param_access, refuse_unserved

__all__ = ["PlainAccess", "from_rank_zero", "param_access", "refuse_unserved"]
