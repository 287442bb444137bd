"""The inputs of every block over all calibration batches of this rank, advanced block by block."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prune_callbacks.calibration.capture import Batch, BlockInputs, capture_inputs, run_block
from prune_callbacks.ranks import Ranks


def calibration_inputs(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch], ranks: Ranks
) -> list[BlockInputs]:
    """
    Captures the inputs of all blocks for the batches of this rank; see `capture_inputs`.

    A rank without batches returns [] if another rank has some. A collective: if the capture fails on one rank,
    all raise ValueError.
    """
    if ranks.size > 1:
        mine = batches if isinstance(batches, Tensor) else list(batches)
        none_here = len(mine) == 0
        idle = not all(ranks.gather(none_here)) and none_here
        return ranks.attempt(lambda: [] if idle else capture_inputs(model, blocks, mine))
    return capture_inputs(model, blocks, batches)


def next_inputs(index: int, block: nn.Module, inputs: list[BlockInputs], where: torch.device, ranks: Ranks) -> None:
    """Replaces the hidden states of every batch by the block's outputs, in place; if one rank fails, all raise."""

    def advance() -> None:
        for batch in inputs:
            batch.hidden = run_block(index, block, batch, where)

    ranks.attempt(advance)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode; restores the mode of every module on exit."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
