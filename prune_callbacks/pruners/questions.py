"""
What the engine, allocations and studies ask a pruner, and the answer of a pruner that does not say.

A pruner answers by an attribute or method of the name given here; none of them is part of the Protocol `Pruner`.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from prune_callbacks.pruners.protocol import JointPruner, Pruner
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import Pool

P = TypeVar("P", bound=Pruner)


def pool(pruner: Pruner) -> Pool:
    """Returns among which weights the pruner chooses: its attribute `pool`, "layer" by default."""
    chosen: Pool = getattr(pruner, "pool", "layer")
    return chosen


def needs_calibration(pruner: Pruner) -> bool:
    """Returns whether the pruner streams the layers' inputs into a statistic."""
    return pruner.statistic(1) is not None


def joint(pruner: Pruner) -> JointPruner | None:
    """Returns the pruner if it solves for several layers with one input at once (`prune_together`); else None."""
    return cast(JointPruner, pruner) if hasattr(pruner, "prune_together") else None


def coupled(pruner: Pruner) -> Any:
    """Returns the pruner if it removes units of coupled layers together (`prune_units`); else None."""
    return pruner if hasattr(pruner, "prune_units") else None


def rounds(pruner: Pruner) -> bool:
    """Returns whether the pruner also rounds what it keeps: it has a `grid`."""
    return getattr(pruner, "grid", None) is not None


def scores_of_weights(pruner: Pruner) -> Callable[..., Any] | None:
    """Returns the pruner's method `scores(weight)` if its scores need no calibration; else None."""
    scores: Callable[..., Any] | None = getattr(pruner, "scores", None)
    return None if scores is None or needs_calibration(pruner) else scores


def takes_pattern(pruner: Pruner) -> bool:
    """Returns whether `with_pattern` can give the pruner another pattern."""
    return is_dataclass(pruner) and "pattern" in {known.name for known in fields(pruner)}


def with_pattern(pruner: P, pattern: Pattern) -> P:
    """
    Returns the pruner with another pattern.

    Raises:
        ValueError: the pruner is no dataclass with a field `pattern`.
    """
    if not takes_pattern(pruner):
        raise ValueError(
            f"{type(pruner).__name__} cannot be given another pattern: it is no dataclass with a field `pattern`"
        )
    return cast(P, replace(cast(Any, pruner), pattern=pattern))
