"""Streams the inputs of a block's layers into statistics."""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.target import Target
from prune_callbacks.anatomy.torch_modules import AttentionTarget
from prune_callbacks.calibration.batches import Batch, run_model
from prune_callbacks.calibration.capture import run_block
from prune_callbacks.calibration.observer import Observer, Pass, SometimesSharedError
from prune_callbacks.calibration.pairs import masks_of
from prune_callbacks.calibration.products import watched, watched_attention, watched_experts
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.solvers.statistics import GroupedStatistic, Statistic


def collect(
    statistic: Callable[[int, torch.device], Statistic | None],
    index: int,
    block: nn.Module,
    targets: Mapping[str, Target],
    inputs: Sequence[BlockInputs],
    where: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, Statistic]:
    """
    Streams the layers' inputs into statistics; layers with the same input tensor share one statistic.

    Outputs are not needed here. So a pass ends when it reaches the last layer, which saves the widest product of a
    decoder block. The first pass is complete. Later passes end early if they call the same layers, each once, on inputs
    of the same shapes.

    If the forward of a layer is not called, a second pass observes the products with its weight. Experts count the
    tokens routed to them. A layer whose inputs were never observed has no statistic.

    Args:
        statistic: makes an empty statistic, as `Pruner.statistic` does.
        index: the index of the block.
        block: the block, which is run on the inputs.
        targets: the targets in the block, by full name.
        inputs: the inputs of the block, which are not changed.
        where: the device to run the block on.
        ranks: the processes, each with its own inputs; the statistics are summed over them.

    Returns:
        The statistic of every observed layer, by full name; the same on every rank.

    Raises:
        ValueError: two layers share their input on one rank, and not on another.
    """

    def passes() -> list[Pass]:
        return [Pass(b.masks, partial(run_block, index, block, b, where), b.hidden.shape) for b in inputs]

    return _collected(statistic, block, targets, passes, where, ranks)


def collect_by_running(
    statistic: Callable[[int, torch.device], Statistic | None],
    model: nn.Module,
    block: nn.Module,
    targets: Mapping[str, Target],
    batches: Sequence[Batch],
    where: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, Statistic]:
    """Streams the inputs of a block's layers into statistics as `collect` does, in passes of the whole model."""

    def passes() -> list[Pass]:
        return [Pass(masks_of(batch), partial(run_model, model, batch)) for batch in batches]

    return _collected(statistic, block, targets, passes, where, ranks)


def _collected(
    statistic: Callable[[int, torch.device], Statistic | None],
    block: nn.Module,
    targets: Mapping[str, Target],
    passes: Callable[[], Sequence[Pass]],
    where: torch.device,
    ranks: Ranks,
) -> dict[str, Statistic]:
    def make(target: Target) -> Statistic:
        parts = [statistic(target.shape[1], where) for _ in range(target.groups)]
        assert parts[0] is not None
        return parts[0] if len(parts) == 1 else GroupedStatistic(parts)

    # Making the passes may fail on one rank: it may read a file.
    found = ranks.attempt(lambda: _observe(make, block, targets, passes(), where))
    return _reduce(lambda name: make(targets[name]), found, ranks)


def _observe(
    make: Callable[[Target], Statistic],
    block: nn.Module,
    targets: Mapping[str, Target],
    passes: Sequence[Pass],
    where: torch.device,
) -> dict[str, tuple[str, Statistic]]:
    """Returns, for every layer, its leader (the first layer with the same input tensor) and the leader's statistic."""
    alone: set[str] = set()
    while True:
        try:
            return _observed(make, block, targets, passes, where, alone)
        except SometimesSharedError as error:  # as where a layer is called twice, once with an input of its own
            alone.add(error.name)


def _observed(
    make: Callable[[Target], Statistic],
    block: nn.Module,
    targets: Mapping[str, Target],
    passes: Sequence[Pass],
    where: torch.device,
    alone: Set[str],
) -> dict[str, tuple[str, Statistic]]:
    """Returns what `_observe` does; the layers in `alone` share no statistic."""
    called = {name: target for name, target in targets.items() if target.seen_by == "call"}
    experts = {name: target for name, target in targets.items() if target.seen_by == "expert"}
    attentions = {name: target for name, target in targets.items() if target.seen_by == "attention"}
    observer = Observer(make, targets, alone)
    with ExitStack() as stack:
        for name, target in called.items():
            hook = target.module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: observer.observe(name, [*args, *kwargs.values()][0]),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        for owner, weights in _by_owner(experts):
            label = next(iter(weights)).rsplit(".", 2)[0]
            stack.enter_context(watched_experts(label, owner, weights, observer.count, observer.first_mask))
        for attention, names in _by_attention(attentions):
            stack.enter_context(watched_attention(attention, names, observer.observe))
        reached = observer.run(block, passes, where)
    uncalled = {name: target for name, target in called.items() if name not in observer.leaders}
    if uncalled and reached:  # Mamba's mixer, for example, multiplies with dt_proj.weight without calling the layer
        with ExitStack() as stack:
            for parent, weights in _by_parent(block, uncalled):
                stack.enter_context(watched(parent, weights, observer.count_real))
            observer.run(block, passes, where)
    return {name: (leader, observer.statistics[leader]) for name, leader in observer.leaders.items()}


def _by_owner(experts: Mapping[str, Target]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Returns the modules of experts, each with its targeted matrices by name."""
    owners = {id(target.module): target.module for target in experts.values()}
    return [
        (owner, {name: target.matrix() for name, target in experts.items() if target.module is owner})
        for owner in owners.values()
    ]


def _by_attention(targets: Mapping[str, Target]) -> list[tuple[nn.MultiheadAttention, dict[str, str]]]:
    """Returns the attentions, each with the names of its targets by their roles."""
    found: dict[int, tuple[nn.MultiheadAttention, dict[str, str]]] = {}
    for name, target in targets.items():
        assert isinstance(target, AttentionTarget)
        found.setdefault(id(target.attention), (target.attention, {}))[1][target.role] = name
    return list(found.values())


def _by_parent(block: nn.Module, targets: Mapping[str, Target]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Returns the modules with targets among their direct children, each with the targets' matrices by name."""
    found = [
        (parent, {n: t.matrix() for n, t in targets.items() if any(c is t.module for c in parent.children())})
        for parent in block.modules()
    ]
    return [(parent, weights) for parent, weights in found if weights]


def _reduce(
    make: Callable[[str], Statistic], found: dict[str, tuple[str, Statistic]], ranks: Ranks
) -> dict[str, Statistic]:
    """Sums the statistics over the ranks; raises ValueError if layers share their input on some ranks only."""
    if ranks.size == 1:
        return {name: statistic for name, (_, statistic) in found.items()}
    # Some ranks may not have observed a layer: they have no batches, or none of their tokens reached it (an expert).
    leaders: dict[str, str] = {}
    for part in ranks.gather({name: leader for name, (leader, _) in found.items()}):
        for name, leader in part.items():
            if leaders.setdefault(name, leader) != leader:
                raise ValueError(f"{name} shares its input with {leader} on one rank and not on another")
    reduced: dict[str, Statistic] = {}
    for leader in dict.fromkeys(leaders.values()):
        statistic = found[leader][1] if leader in found else make(leader)
        statistic.reduce(ranks)
        reduced[leader] = statistic
    return {name: reduced[leader] for name, leader in leaders.items()}
