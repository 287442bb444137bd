"""What an allocation is, and what those of this room share: sizes, names, counts and measured sensitivities."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from prune_callbacks.anatomy.naming import inside
from prune_callbacks.pruners import Pruner
from prune_callbacks.solvers import Gram, InputNorm
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import at_sparsity, removes_single_weights

Values = Mapping[str, Any]
"""What was measured of every layer."""


@runtime_checkable
class Allocation(Protocol):
    """
    Spreads a pattern's sparsity over layers, unevenly, with the same total.

    `statistic` makes what the layers' inputs are streamed into on a pass over the dense model; None: no pass is needed.
    `measure` is asked for the values of every block's layers, with their statistics, `choose` at the end for the
    patterns of all.
    """

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError for a pattern whose sparsity cannot be spread so."""

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram | InputNorm | None: ...

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]: ...

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]: ...


def unit_of(name: str, units: Iterable[str]) -> str | None:
    """Returns the smallest of the units that a layer is in: itself, the tensor that an expert is in, or the block."""
    return max((unit for unit in units if inside(name, unit)), key=len, default=None)


def read_sensitivities(path: str | Path) -> dict[str, Any]:
    """
    Reads what `sensitivity(path=...)` or `recipe=sensitivity` wrote: its setting and its cells.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"no sensitivities at {path}; python train.py recipe=sensitivity measures them")
    results: dict[str, Any] = json.loads(Path(path).read_text())
    if not {"unit"} <= set(results.get("setting", {})) or "cells" not in results:
        raise ValueError(f"{path} holds no sensitivities; python train.py recipe=sensitivity writes sensitivity.json")
    return results


def layer_sizes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Counts the weights of every layer."""
    return {name: rows * columns for name, (rows, columns) in shapes.items()}


def with_counts(removed: Mapping[str, int], sizes: Mapping[str, int], pattern: Pattern) -> dict[str, Pattern]:
    """Returns the pattern for every layer, with the sparsity that removes so many of its weights."""
    return {name: at_sparsity(pattern, count / sizes[name]) for name, count in removed.items()}


def check_single_weights(name: str, pattern: Pattern) -> None:
    """Raises ValueError, in the name of an allocation, for a pattern whose weights do not go one by one."""
    if not removes_single_weights(pattern):
        raise ValueError(
            f"{name} spreads the sparsity of Unstructured over layers and cannot spread {pattern}: its weights do not "
            "go one by one"
        )
