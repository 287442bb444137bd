"""Applies an allocation: measures the dense model block by block, and gives every layer its own pattern."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.allocation.protocol import Allocation, layer_sizes, with_counts
from prune_callbacks.anatomy.names import belongs
from prune_callbacks.anatomy.target import Target
from prune_callbacks.calibration.sources import Source
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import needs_calibration, pool, takes_pattern, with_pattern
from prune_callbacks.ranks import Ranks
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import removes_single_weights, with_exact_total


def check_allocation(allocation: Allocation, pruner: Pruner) -> None:
    """Raises ValueError for an allocation that is none, or that the pruner or its pattern does not support."""
    if not isinstance(allocation, Allocation):
        raise ValueError(
            "allocation is None or one such as OWL(), LagrangianAllocation() or MeasuredAllocation(), got "
            f"{allocation!r}"
        )
    if not takes_pattern(pruner):
        raise ValueError(
            f"{type(pruner).__name__} takes its masks as they are; allocate with the pruner that chooses them"
        )
    allocation.check(pruner.pattern)


def prepared(allocation: Allocation, model: nn.Module, batches: Any, pruner: Pruner, **settings: Any) -> Allocation:
    """Returns the allocation, which has measured the whole dense model if it has a method `prepared`; a collective."""
    prepare = getattr(allocation, "prepared", None)
    return allocation if prepare is None else prepare(model, batches, pruner, **settings)


def allocate(
    allocation: Allocation,
    pruner: Pruner,
    blocks: Sequence[tuple[str, nn.Module]],
    targets: Mapping[str, Target],
    source: Source,
    device: torch.device | None,
    ranks: Ranks,
) -> dict[str, Pruner]:
    """
    Returns a pruner for every layer: `pruner` with the layer's own pattern. The model is not changed.

    Experts that no token reached, grouped convolutions and recurrent layers get the sparsity of `pruner`.

    Args:
        allocation: chooses the patterns.
        pruner: the pruner of all layers; its pattern has the sparsity of all layers together.
        blocks: the model's decoder blocks.
        targets: the targets, by name.
        source: the inputs of the first block; not changed.
        device: the device to run blocks on; None: their own.
        ranks: the processes, each with its own inputs; rank 0 chooses.

    Raises:
        ValueError: calibration saw no inputs of a layer, or the allocation refuses its values.
    """
    shapes = {name: target.shape for name, target in targets.items()}
    passed = needs_calibration(allocation)
    if passed:
        values = _measured(allocation, pruner, blocks, targets, source, device, ranks)
    else:
        values = allocation.measure(pruner, _weights(targets), {})
    pattern = with_exact_total(pruner.pattern, pool(pruner))
    unreached = {name: shape for name, shape in shapes.items() if passed and name not in values}
    measured = {name: shape for name, shape in shapes.items() if name not in unreached}
    chosen = ranks.share(ranks.attempt(lambda: allocation.choose(values, measured, pattern)))
    chosen |= _as_it_is(pattern, layer_sizes(unreached), sum(layer_sizes(measured).values()))
    return {name: with_pattern(pruner, chosen[name]) for name in targets}


def _measured(
    allocation: Allocation,
    pruner: Pruner,
    blocks: Sequence[tuple[str, nn.Module]],
    targets: Mapping[str, Target],
    source: Source,
    device: torch.device | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Returns the allocation's values of all layers that a token reaches, measured in a pass over the dense blocks."""
    shown = source.copy()
    # Of grouped convolutions and recurrent layers no statistic of one matrix is known.
    measurable = {name: t for name, t in targets.items() if t.groups == 1 and t.seen_by != "never"}
    values: dict[str, Any] = {}
    with closing(shown.visits(blocks, device)) as visits:
        for index, block_name, block, where in visits:
            mine = {name: target for name, target in measurable.items() if belongs(name, block_name)}
            if mine:
                statistics = _seen(mine, shown.collect(allocation.statistic, index, block, mine, where))
                weights = _weights({name: target for name, target in mine.items() if name in statistics})
                values |= ranks.share(ranks.attempt(lambda w=weights, s=statistics: allocation.measure(pruner, w, s)))  # type: ignore[misc]
                del weights, statistics  # otherwise this block would stay on the device with the next two
            if index < len(blocks) - 1:
                shown.advance(index, block, where)
    return values


def _seen(targets: Mapping[str, Target], statistics: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """
    Returns the statistics of the layers that a token reached.

    Experts that no token reached are left out if other experts in their tensor were reached: they keep the given
    pattern and are pruned by Magnitude.

    Raises:
        ValueError: calibration saw no inputs of another layer, or of all experts in a tensor.
    """
    experts = {name for name, target in targets.items() if target.routed}
    seen = {name: found for name, found in statistics.items() if found.tokens or name not in experts}
    reached = {targets[name].parameter_name for name in seen}
    for name in sorted(targets.keys() - seen.keys()):
        if name not in experts or targets[name].parameter_name not in reached:
            raise ValueError(
                f"{name}: {targets[name].unseen} during calibration, so no sparsity can be allocated to it; leave it "
                "out of `targets`"
            )
    return seen


def _weights(targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Returns the targets' matrices, (out, in), on their current device."""
    return {name: target.matrix() for name, target in targets.items()}


def _as_it_is(pattern: Pattern, sizes: Mapping[str, int], others: int) -> dict[str, Pattern]:
    """Returns the unallocated pattern for layers; counts of `Unstructured` continue after `others` weights exactly."""
    if not removes_single_weights(pattern):
        return dict.fromkeys(sizes, pattern)
    removed, before = {}, others
    for name, size in sizes.items():
        removed[name] = round(pattern.sparsity * (before + size)) - round(pattern.sparsity * before)
        before += size
    return with_counts(removed, sizes, pattern)
