"""
Optional attributes and methods of a pruner, with their defaults. None of them is part of the Protocol `Pruner`.

| attribute or method | default | effect |
|---|---|---|
| `pool` | "layer" | the pool of patterns that leave it open: "row" or "layer" |
| `prune_together(weights, statistic)` | `prune` of each | layers that share their input are solved for together |
| `prune_units(...)`, `removed(units)` | single layers | coupled layers lose the same units; see `Structured` |
| `grid` | `None` | the pruner also rounds; the engine gives it no fused experts |
| `scores(weight)` | none | `IterativePrune` takes the pruner, if `statistic` returns None |
| dataclass field `pattern` | required by allocations | an allocation gives every layer a pattern of its own |

Every attribute `grid` other than None has this effect: do not use the name for anything else.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, cast

import torch

from prune_callbacks.pruners.protocol import JointPruner, Pruner
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import Pool

P = TypeVar("P", bound=Pruner)


class MakesStatistic(Protocol):
    """A pruner or an allocation: it says by `statistic` what it needs to see of a layer's inputs."""

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Any:
        """Makes an empty statistic of the layer's inputs; returns None if it needs none."""


def pool(pruner: Pruner) -> Pool:
    """Returns the attribute `pool`: the weights that are compared with each other, "layer" by default."""
    chosen: Pool = getattr(pruner, "pool", "layer")
    return chosen


def needs_calibration(part: MakesStatistic) -> bool:
    """Returns whether a pruner or an allocation needs calibration: `statistic(1)` is not None."""
    return part.statistic(1, None) is not None


def joint(pruner: Pruner) -> JointPruner | None:
    """Returns the pruner if it has the method `prune_together`, for layers that share their input; else None."""
    return cast(JointPruner, pruner) if hasattr(pruner, "prune_together") else None


def coupled(pruner: Pruner) -> Any:
    """
    Returns the pruner if it has the method `prune_units`, for units of coupled layers; else None.

    It must then also have `removed(units)`, the number of units to remove from a pool of so many. See `Structured`.
    """
    return pruner if hasattr(pruner, "prune_units") else None


def rounds(pruner: Pruner) -> bool:
    """Returns whether the attribute `grid` is not None: the pruner also rounds, and takes no fused experts."""
    return getattr(pruner, "grid", None) is not None


def scores_of_weights(pruner: Pruner) -> Callable[..., Any] | None:
    """Returns the method `scores(weight)` if the pruner has one and needs no calibration; else None."""
    scores: Callable[..., Any] | None = getattr(pruner, "scores", None)
    return None if scores is None or needs_calibration(pruner) else scores


def takes_pattern(pruner: Pruner) -> bool:
    """Returns whether the pruner is a dataclass with a field `pattern`; any other gets no allocation."""
    return is_dataclass(pruner) and "pattern" in {known.name for known in fields(pruner)}


def with_pattern(pruner: P, pattern: Pattern) -> P:
    """
    Returns a copy of the pruner with another pattern in its dataclass field `pattern`.

    Raises:
        ValueError: the pruner is no dataclass with a field `pattern`.
    """
    if not takes_pattern(pruner):
        raise ValueError(
            f"{type(pruner).__name__} cannot be given another pattern: it is no dataclass with a field `pattern`"
        )
    return cast(P, replace(cast(Any, pruner), pattern=pattern))
