"""Reaching parameters, gradients and optimizer state under a training strategy."""

from prune_callbacks.parallel.plain import PlainAccess, param_access, refuse_unserved

__all__ = ["PlainAccess", "param_access", "refuse_unserved"]
