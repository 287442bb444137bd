"""What reaches the layers of a block, streamed into statistics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prune_callbacks.calibration.capture import BlockInputs, run_block
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.solvers import Gram, InputNorm


def collect(
    statistic: Callable[[int, torch.device], Gram | InputNorm | None],
    index: int,
    block: nn.Module,
    layers: dict[str, nn.Module],
    inputs: list[BlockInputs],
    where: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, Gram | InputNorm]:
    """
    Streams the layers' inputs into statistics; layers that get the same tensor share one.

    Args:
        statistic: makes an empty one, as `Pruner.statistic`.
        index: of the block.
        block: is run on the inputs.
        layers: of the block, by full name.
        inputs: of the block.
        where: the device on which the block is run.
        ranks: each has inputs of its own; the statistics are summed over them.
    """

    def make(size: int) -> Gram | InputNorm:
        made = statistic(size, where)
        assert made is not None
        return made

    found = ranks.attempt(lambda: _observe(make, index, block, layers, inputs, where))
    return _reduce(make, found, ranks)


def _observe(
    make: Callable[[int], Gram | InputNorm],
    index: int,
    block: nn.Module,
    layers: dict[str, nn.Module],
    inputs: list[BlockInputs],
    where: torch.device,
) -> dict[str, tuple[str, Gram | InputNorm]]:
    """For every layer the first of those that get the same tensor, and its statistic."""
    statistics: dict[str, Gram | InputNorm] = {}
    leaders: dict[str, str] = {}
    seen: dict[int, tuple[Tensor, str]] = {}
    tokens: Tensor | None = None

    def observe(name: str, x: Tensor) -> None:
        # The tensor is held in `seen` for the length of one pass, so that its id stays its own.
        leader = seen.setdefault(id(x), (x, name))[1]
        if leaders.setdefault(name, leader) != leader:
            raise ValueError(f"{name} shares its input with {leaders[name]} in one batch and not in another")
        if leader != name:
            return
        if name not in statistics:
            statistics[name] = make(x.shape[-1])
        if tokens is not None and x.shape[:2] == tokens.shape:
            x = x[tokens]
        elif tokens is not None and x.ndim == 2 and len(x) == tokens.numel():  # OPT's MLP sees flat tokens
            x = x[tokens.flatten()]
        statistics[name].update(x)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        for batch in inputs:
            seen.clear()
            tokens = None if batch.tokens is None else batch.tokens.to(where)
            run_block(index, block, batch, where)
    finally:
        for hook in hooks:
            hook.remove()
        seen.clear()
    return {name: (leader, statistics[leader]) for name, leader in leaders.items()}


def _reduce(
    make: Callable[[int], Gram | InputNorm], found: dict[str, tuple[str, Gram | InputNorm]], ranks: Ranks
) -> dict[str, Gram | InputNorm]:
    if ranks.size == 1:
        return {name: statistic for name, (_, statistic) in found.items()}
    # A rank without batches, or whose batches did not reach a layer (an expert), has nothing to say about it.
    leaders: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for part in ranks.gather({name: (lead, len(s.squared_norm)) for name, (lead, s) in found.items()}):
        for name, (leader, size) in part.items():
            if leaders.setdefault(name, leader) != leader:
                raise ValueError(f"{name} shares its input with {leader} on one rank and not on another")
            sizes[leader] = size
    reduced: dict[str, Gram | InputNorm] = {}
    for leader, size in sizes.items():
        statistic = found[leader][1] if leader in found else make(size)
        statistic.reduce(ranks)
        reduced[leader] = statistic
    return {name: reduced[leader] for name, leader in leaders.items()}
