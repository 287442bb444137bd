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
    """What every block is called with, for all batches of this rank; see `capture_inputs`."""
    if ranks.size > 1:
        mine = batches if isinstance(batches, Tensor) else list(batches)
        none_here = len(mine) == 0
        idle = not all(ranks.gather(none_here)) and none_here
        return ranks.attempt(lambda: [] if idle else capture_inputs(model, blocks, mine))
    return capture_inputs(model, blocks, batches)


def next_inputs(index: int, block: nn.Module, inputs: list[BlockInputs], where: torch.device, ranks: Ranks) -> None:
    """Makes the inputs of the next block out of those of this one, in place."""

    def advance() -> None:
        for batch in inputs:
            batch.hidden = run_block(index, block, batch, where)

    ranks.attempt(advance)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode, and back on exit."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
