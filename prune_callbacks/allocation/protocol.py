"""The protocol of an allocation, and common helpers: sizes, names, counts and measured sensitivities."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from prune_callbacks.anatomy.names import inside
from prune_callbacks.interfaces import compared_by_name
from prune_callbacks.pruners import Pruner
from prune_callbacks.solvers import Gram, InputNorm
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import at_sparsity, removes_single_weights

Values = Mapping[str, Any]
"""The measured value of every layer, by name."""


@compared_by_name
@runtime_checkable
class Allocation(Protocol):
    """
    The interface of an allocation, which spreads a pattern's sparsity unevenly over layers with the same total.

    `statistic` returns an empty statistic, for the layers' inputs in a pass over the dense model, or None if no pass is
    needed. `measure` is called once per block (once in all without a pass) with the block's weights, (out, in), and
    statistics, by layer name; it returns the values of these layers. `choose` is called once at the end with the values
    and shapes of all layers, and returns their patterns.

    An allocation may also have a method `prepared(model, batches, pruner, *, targets, blocks, device, progress,
    ranks)`, which is called first, on the dense model, and returns the allocation to use; see `MeasuredAllocation`.
    """

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError for a pattern that the allocation does not support."""

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram | InputNorm | None: ...

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]: ...

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]: ...


def unit_of(name: str, units: Iterable[str]) -> str | None:
    """Returns the smallest of the `units` that contain a layer: itself, an expert's tensor or the block; else None."""
    return max((unit for unit in units if inside(name, unit)), key=len, default=None)


def read_sensitivities(path: str | Path) -> dict[str, Any]:
    """
    Reads a file that `sensitivity(path=...)` or `recipe=sensitivity` wrote: its `setting` and its `cells`.

    Raises:
        ValueError: there is no such file, or it holds no sensitivities.
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
    """Returns, for every layer, the pattern at the sparsity that removes `removed` of its weights."""
    return {name: at_sparsity(pattern, count / sizes[name]) for name, count in removed.items()}


def check_single_weights(name: str, pattern: Pattern) -> None:
    """Raises ValueError, naming the allocation, for a pattern that does not remove single weights."""
    if not removes_single_weights(pattern):
        raise ValueError(
            f"{name} spreads the sparsity of Unstructured over layers and cannot spread {pattern}, which does not "
            "remove single weights"
        )
