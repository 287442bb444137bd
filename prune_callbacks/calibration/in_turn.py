"""Chooses the source of a model's stages: a chain, the whole model again and again, or several sources in turn."""

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.stages import Stages
from prune_callbacks.anatomy.target import Target
from prune_callbacks.calibration.batches import Batch, named_inputs, warn_of_dropped_keys
from prune_callbacks.calibration.chain import calls, chain_inputs, order_of_execution
from prune_callbacks.calibration.checks import check_batches
from prune_callbacks.calibration.pairs import told_apart
from prune_callbacks.calibration.prefetch import Visit
from prune_callbacks.calibration.sources import Chain, Make, Rerun, Source, Statistics, evaluating
from prune_callbacks.calibration.stand_ins import BlockInputs, NotAChainError
from prune_callbacks.ranks import Ranks


class InTurn(Source):
    """
    Several sources, one after another, each for the stages that the model runs next.

    A source is made when its first stage is visited, so it finds all earlier stages pruned.

    Args:
        runs: the indices of the stages of every source, in the order of their execution.
        make: makes the source of a run.
    """

    def __init__(self, runs: Sequence[Sequence[int]], make: Callable[[Sequence[int]], Source]) -> None:
        self.runs = runs
        self._make = make
        self._now: Source
        self._own: dict[int, int] = {}

    def visits(self, blocks: Sequence[tuple[str, nn.Module]], device: torch.device | None) -> Generator[Visit]:
        for run in self.runs:
            here = [index for index in run if index < len(blocks)]
            if here:
                self._now, self._own = self._make(run), {index: own for own, index in enumerate(here)}
                with closing(self._now.visits([blocks[index] for index in here], device)) as visits:
                    for own, name, block, where in visits:
                        yield here[own], name, block, where

    def collect(
        self, statistic: Make, index: int, block: nn.Module, targets: Mapping[str, Target], where: torch.device
    ) -> Statistics:
        return self._now.collect(statistic, self._own[index], block, targets, where)

    def calls(self, index: int) -> bool:
        return self._now.calls(self._own[index])

    def advance(self, index: int, block: nn.Module, where: torch.device) -> None:
        self._now.advance(self._own[index], block, where)

    def output(self, index: int, block: nn.Module, where: torch.device) -> Tensor | None:
        return self._now.output(self._own[index], block, where)

    def copy(self) -> "InTurn":
        return InTurn(self.runs, self._make)


def last_called(model: nn.Module, stages: Stages, batches: Any, ranks: Ranks) -> str | None:
    """
    Returns the name of the stage that the model calls last, on the first batch of the first rank that has one.

    Frozen stages beside trained ones, such as a teacher, do not count. None if there is no batch, or no stage is
    called. A collective of the ranks.
    """

    def found() -> str | None:
        if not len(batches):
            return None
        check_batches(model, batches)
        trained = [pair for pair in stages.parts if any(p.requires_grad for p in pair[1].parameters())]
        parts = trained or stages.parts
        with evaluating(model):
            order = calls(model, [part for _, part in parts], batches[0])
        return parts[order[-1]][0] if order else None

    return next((name for name in ranks.gather(ranks.attempt(found)) if name is not None), None)


def calibration_source(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Iterable[Batch],
    ranks: Ranks,
    lists: Sequence[str | None] | None = None,
) -> Source:
    """
    Returns the source of the stages' inputs.

    Blocks of one list that follow each other are run as a chain, if they form one, else with a warning by the whole
    model; single layers by the whole model. A rank may have no batches if another has some. A collective of the ranks.

    Args:
        model: the model.
        blocks: the stages.
        batches: the batches of this rank.
        ranks: the processes.
        lists: for every stage the name of its list of blocks, None for a single layer; None: all are of one list.

    Raises:
        ValueError: there is no batch, or one does not fit the model; on every rank, if it is so on one.
    """
    mine: Any = batches if isinstance(batches, Tensor) else [told_apart(model, named_inputs(b)) for b in batches]
    idle = not all(ranks.gather(len(mine) == 0)) and len(mine) == 0  # every rank gathers
    lists = ["blocks"] * len(blocks) if lists is None else lists
    if len(set(lists)) == 1 and lists[0] is not None:
        return _of_a_list(model, blocks, mine, ranks, idle)

    def ordered() -> list[int]:
        if idle:
            return []
        if not len(mine):
            raise ValueError("there is no calibration batch; give at least one")
        check_batches(model, mine)
        warn_of_dropped_keys(model, mine)
        return order_of_execution(model, blocks, mine[0]) if len(blocks) > 1 else [0]

    order = next(filter(None, ranks.gather(ranks.attempt(ordered))))
    chains = _chains(order, lists)
    ends = [lists[index] if lists[index] in chains else None for index in order]
    runs = [[order[place] for place, _ in run] for _, run in groupby(enumerate(ends), key=lambda pair: pair[1])]

    def make(run: Sequence[int]) -> Source:
        own = [blocks[index] for index in run]
        if lists[run[0]] in chains:
            return _of_a_list(model, own, mine, ranks, idle, f"in {lists[run[0]]}, ")
        return Rerun(model, range(len(own)), mine, ranks)

    return make(order) if len(runs) == 1 and order == sorted(order) else InTurn(runs, make)


def _chains(order: Sequence[int], lists: Sequence[str | None]) -> set[str]:
    """Returns the lists of blocks that run one after another, in the order of the list and with nothing between."""
    found: set[str] = set()
    for name in {name for name in lists if name is not None}:
        members = [index for index, owner in enumerate(lists) if owner == name]
        begin = list(order).index(members[0])
        if len(members) > 1 and list(order[begin : begin + len(members)]) == members:
            found.add(name)
    return found


def _of_a_list(
    model: nn.Module, blocks: Sequence[nn.Module], mine: Any, ranks: Ranks, idle: bool, where: str = ""
) -> Source:
    """
    Returns the source of the blocks of one list: a chain, or with a warning the whole model if they form none.

    `where` names the list in the warning, if there are several.
    """

    def captured() -> tuple[list[BlockInputs], str | None]:
        try:
            return ([] if idle else chain_inputs(model, blocks, mine)), None
        except NotAChainError as error:
            return [], str(error)

    inputs, problem = ranks.attempt(captured)
    problem = next((found for found in ranks.gather(problem) if found is not None), None)
    if problem is None:
        return Chain(inputs, ranks)
    if ranks.rank == 0:
        warnings.warn(
            f"{type(model).__name__}: {where}{problem}. So the whole model runs again for every block, which is slower",
            stacklevel=5,
        )
    order = ranks.attempt(lambda: [] if idle else order_of_execution(model, blocks, mine[0]))
    return Rerun(model, next(filter(None, ranks.gather(order))), mine, ranks, problem)
