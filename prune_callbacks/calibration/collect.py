"""Streams the inputs of a block's layers into statistics."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.target import Target
from prune_callbacks.calibration.capture import BlockInputs, run_block
from prune_callbacks.calibration.products import watched, watched_experts
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.solvers import Gram, InputNorm


class _AllSeenError(Exception):
    """Ends a pass through a block when all layers have been observed."""


def collect(
    statistic: Callable[[int, torch.device], Gram | InputNorm | None],
    index: int,
    block: nn.Module,
    targets: Mapping[str, Target],
    inputs: list[BlockInputs],
    where: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, Gram | InputNorm]:
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
        ValueError: two layers share their input in one batch, or on one rank, and not in another.
    """

    def make(size: int) -> Gram | InputNorm:
        made = statistic(size, where)
        assert made is not None
        return made

    found = ranks.attempt(lambda: _observe(make, index, block, targets, inputs, where))
    return _reduce(make, found, ranks)


def _observe(
    make: Callable[[int], Gram | InputNorm],
    index: int,
    block: nn.Module,
    targets: Mapping[str, Target],
    inputs: list[BlockInputs],
    where: torch.device,
) -> dict[str, tuple[str, Gram | InputNorm]]:
    """Returns, for every layer, its leader (the first layer with the same input tensor) and the leader's statistic."""
    called = {name: target for name, target in targets.items() if not target.shares_parameter}
    experts = {name: target for name, target in targets.items() if target.shares_parameter}
    observer = _Observer(make, sorted(targets))
    with ExitStack() as stack:
        for name, target in called.items():
            hook = target.module.register_forward_pre_hook(lambda _, args, name=name: observer.observe(name, args[0]))
            stack.callback(hook.remove)
        for owner, weights in _by_owner(experts):
            label = next(iter(weights)).rsplit(".", 2)[0]
            stack.enter_context(watched_experts(label, owner, weights, observer.count, lambda: observer.tokens))
        observer.run(index, block, inputs, where)
    uncalled = {name: target for name, target in called.items() if name not in observer.leaders}
    if uncalled:  # Mamba's mixer, for example, multiplies with dt_proj.weight without calling the layer
        with ExitStack() as stack:
            for parent, weights in _by_parent(block, uncalled):
                stack.enter_context(watched(parent, weights, observer.count_real))
            observer.run(index, block, inputs, where)
    return {name: (leader, observer.statistics[leader]) for name, leader in observer.leaders.items()}


class _Observer:
    """
    Adds the inputs of a block's layers to statistics, one batch after another.

    Attributes:
        statistics: the statistic of every leader: the first of the layers with the same input tensor.
        leaders: the leader of every layer observed so far.
        tokens: True for the real tokens of the running batch, (batch, tokens); None: all are real.
    """

    def __init__(self, make: Callable[[int], Gram | InputNorm], names: list[str]) -> None:
        self.statistics: dict[str, Gram | InputNorm] = {}
        self.leaders: dict[str, str] = {}
        self.tokens: Tensor | None = None
        self._make = make
        self._names = names
        self._seen: dict[int, tuple[Tensor, str]] = {}
        self._calls: list[tuple[str, torch.Size]] = []
        # The calls of a complete pass, if later passes may end at the last of them.
        self._whole: list[tuple[str, torch.Size]] | None = None
        self._untold: set[str] = set()

    def run(self, index: int, block: nn.Module, inputs: list[BlockInputs], where: torch.device) -> None:
        """Runs the block on every batch: completely on the first, on others until the last layer is observed."""
        for number, batch in enumerate(inputs):
            self._seen.clear()
            self._calls.clear()
            self.tokens = None if batch.tokens is None else batch.tokens.to(where)
            with suppress(_AllSeenError):
                run_block(index, block, batch, where)
            if number == 0 and sorted(name for name, _ in self._calls) == self._names:  # experts are never called
                self._whole = self._calls.copy()
        self._seen.clear()

    def observe(self, name: str, x: Tensor) -> None:
        """Records a call of layer `name` with `x`."""
        # The tensor is kept alive during one pass, so that its id stays unique.
        leader = self._seen.setdefault(id(x), (x, name))[1]
        if self.leaders.setdefault(name, leader) != leader:
            raise ValueError(f"{name} shares its input with {self.leaders[name]} in one batch and not in another")
        if leader == name:
            self.count_real(name, x)
        self._calls.append((name, x.shape))
        if self._calls == self._whole:
            raise _AllSeenError

    def count_real(self, name: str, x: Tensor) -> None:
        """Adds the inputs of real tokens; if they cannot be identified, warns once and adds all inputs."""
        real = x if self.tokens is None else _real(x, self.tokens)
        if real is None and name not in self._untold:
            self._untold.add(name)
            warnings.warn(
                f"{name} gets inputs of shape {tuple(x.shape)}, in which padding cannot be identified: all count. "
                "Give calibration windows without padding",
                stacklevel=3,
            )
        self.count(name, x if real is None else real)

    def count(self, name: str, x: Tensor) -> None:
        """Adds all inputs `x`, (..., in)."""
        self.leaders[name] = name
        if name not in self.statistics:
            self.statistics[name] = self._make(x.shape[-1])
        self.statistics[name].update(x)


def _real(x: Tensor, tokens: Tensor) -> Tensor | None:
    """Returns the inputs of real tokens, given the mask (batch, tokens); None if the shapes do not identify them."""
    if x.shape[:2] == tokens.shape:
        return x[tokens]
    if x.ndim == 2 and len(x) == tokens.numel():  # OPT's MLP sees flat tokens
        return x[tokens.flatten()]
    if x.ndim == 4 and (len(x), x.shape[2]) == tokens.shape:  # (batch, heads, tokens, in): DeepSeek's kv_b_proj
        return x.transpose(1, 2)[tokens]
    return None


def _by_owner(experts: Mapping[str, Target]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Returns the modules of experts, each with its targeted matrices by name."""
    owners = {id(target.module): target.module for target in experts.values()}
    return [
        (owner, {name: target.matrix() for name, target in experts.items() if target.module is owner})
        for owner in owners.values()
    ]


def _by_parent(block: nn.Module, targets: Mapping[str, Target]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Returns the modules with targets among their direct children, each with the targets' matrices by name."""
    found = [
        (parent, {n: t.matrix() for n, t in targets.items() if any(c is t.module for c in parent.children())})
        for parent in block.modules()
    ]
    return [(parent, weights) for parent, weights in found if weights]


def _reduce(
    make: Callable[[int], Gram | InputNorm], found: dict[str, tuple[str, Gram | InputNorm]], ranks: Ranks
) -> dict[str, Gram | InputNorm]:
    """Sums the statistics over the ranks; raises ValueError if layers share their input on some ranks only."""
    if ranks.size == 1:
        return {name: statistic for name, (_, statistic) in found.items()}
    # Some ranks may not have observed a layer: they have no batches, or none of their tokens reached it (an expert).
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
