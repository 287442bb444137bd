"""Sources of a stage's inputs: a chain of blocks, or the whole model, which runs again for every stage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.target import Target
from prune_callbacks.calibration.batches import Batch
from prune_callbacks.calibration.capture import run_block
from prune_callbacks.calibration.chain import hidden_states
from prune_callbacks.calibration.collect import collect, collect_by_running
from prune_callbacks.calibration.prefetch import Visit, visited
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.ranks import Ranks
from prune_callbacks.solvers.statistics import Statistic

Statistics = dict[str, Statistic]
Make = Callable[[int, torch.device], Statistic | None]


class Source(ABC):
    """
    The inputs of every block, over the calibration batches of all ranks.

    The blocks are visited in the order of their execution, and a block is pruned before the next one is visited.

    Attributes:
        unlinked: why the stages form no chain, as a clause for a message.
    """

    unlinked = "the layers of this model are stages by themselves, or its blocks are in several lists"

    @abstractmethod
    def visits(self, blocks: Sequence[tuple[str, nn.Module]], device: torch.device | None) -> Generator[Visit]:
        """Yields the blocks in order, each on the device that it runs on; see `visited`."""

    @abstractmethod
    def collect(
        self, statistic: Make, index: int, block: nn.Module, targets: Mapping[str, Target], where: torch.device
    ) -> Statistics:
        """Streams the inputs of a block's targets into statistics; see `collect` in collect.py."""

    @abstractmethod
    def calls(self, index: int) -> bool:
        """Returns whether the model calls a block in any batch; ask after `collect`."""

    @abstractmethod
    def advance(self, index: int, block: nn.Module, where: torch.device) -> None:
        """Moves on from a block, once it is pruned, to the inputs of the next."""

    @abstractmethod
    def output(self, index: int, block: nn.Module, where: torch.device) -> Tensor | None:
        """Returns the output of a block for the first batch of this rank; None if it has no batches."""

    @abstractmethod
    def copy(self) -> "Source":
        """Returns a source that stands at the same block and moves on by itself."""

    def chain(self, who: str, lists: Sequence[str | None] | None = None) -> "Chain":
        """
        Returns the source as a chain.

        Args:
            who: names who asks, in the error.
            lists: the names of the lists of blocks, for the error.

        Raises:
            ValueError: the stages form no chain.
        """
        named = sorted({name for name in lists or () if name is not None})
        advice = f'. If the blocks of one list do, name it, e.g. blocks="{named[0]}"; found {named}' if named else ""
        raise ValueError(
            f"{who} needs blocks that form a chain, each with the hidden states of the one before it, but "
            f"{self.unlinked}{advice}"
        )


class Chain(Source):
    """
    The hidden states of every batch, which one block after another computes.

    Args:
        inputs: the inputs of the first block.
        ranks: the processes, each with its own inputs.
    """

    def __init__(self, inputs: Sequence[BlockInputs], ranks: Ranks) -> None:
        self.inputs = inputs
        self.ranks = ranks

    def visits(self, blocks: Sequence[tuple[str, nn.Module]], device: torch.device | None) -> Generator[Visit]:
        return visited(blocks, device, self.ranks)

    def collect(
        self, statistic: Make, index: int, block: nn.Module, targets: Mapping[str, Target], where: torch.device
    ) -> Statistics:
        return collect(statistic, index, block, targets, self.inputs, where, self.ranks)

    def calls(self, index: int) -> bool:
        return any(self.ranks.gather(any(batch.calls[index] is not None for batch in self.inputs)))

    def advance(self, index: int, block: nn.Module, where: torch.device) -> None:
        def run() -> None:
            for batch in self.inputs:
                batch.hidden = run_block(index, block, batch, where)

        self.ranks.attempt(run)

    def output(self, index: int, block: nn.Module, where: torch.device) -> Tensor | None:
        return run_block(index, block, self.inputs[0], where) if self.inputs else None

    def copy(self) -> "Chain":
        return Chain([replace(batch) for batch in self.inputs], self.ranks)

    def chain(self, who: str, lists: Sequence[str | None] | None = None) -> "Chain":
        return self


class Rerun(Source):
    """
    Forward passes of the whole model, pruned so far, for every block; right for any order of blocks.

    Args:
        model: the model.
        order: the indices of the blocks, in the order of their execution.
        batches: the batches of this rank.
        ranks: the processes, each with its own batches.
        why: why the blocks form no chain, if they could; None: they are single layers.
    """

    def __init__(
        self,
        model: nn.Module,
        order: Sequence[int],
        batches: Sequence[Batch],
        ranks: Ranks,
        why: str | None = None,
    ) -> None:
        if why is not None:
            self.unlinked = f"in {type(model).__name__} {why}"
        self.model = model
        self.order = order
        self.batches = batches
        self.ranks = ranks
        self._called: set[int] = set()

    def visits(self, blocks: Sequence[tuple[str, nn.Module]], device: torch.device | None) -> Generator[Visit]:
        homes = {module: next(module.parameters()).device for module in (self.model, *(b for _, b in blocks))}
        if device is not None:
            self.ranks.attempt(lambda: self._move(device))
        try:
            for index in self.order:
                if index < len(blocks):
                    name, block = blocks[index]
                    yield index, name, block, device or homes[block]
        finally:
            if device is not None:
                self.model.to(homes[self.model])

    def _move(self, where: torch.device) -> None:
        try:
            self.model.to(where)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{type(self.model).__name__} does not fit on {where}, where all of it must run: its blocks form no "
                "chain, so they cannot be moved there one at a time. Leave out device, or use a larger one"
            ) from error

    def collect(
        self, statistic: Make, index: int, block: nn.Module, targets: Mapping[str, Target], where: torch.device
    ) -> Statistics:
        hook = block.register_forward_pre_hook(lambda *_: self._called.add(index))
        try:
            return collect_by_running(statistic, self.model, block, targets, self.batches, where, self.ranks)
        finally:
            hook.remove()

    def calls(self, index: int) -> bool:
        return any(self.ranks.gather(index in self._called))

    def advance(self, index: int, block: nn.Module, where: torch.device) -> None:
        """Does nothing: the next pass runs the pruned block."""

    def output(self, index: int, block: nn.Module, where: torch.device) -> Tensor | None:
        return hidden_states(self.model, {index: block}, self.batches[0]).get(index) if self.batches else None

    def copy(self) -> "Rerun":
        return self


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Puts the model into evaluation mode; restores the mode of every module on exit.

    Turns off torch's fused path of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, which calls no layer.
    """
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, was in training.items():
            module.training = was
