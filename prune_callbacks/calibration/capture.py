"""Captures the inputs that a model passes to its decoder blocks, and runs one block on them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.ends import output_layer
from prune_callbacks.calibration.batches import Batch, to_device
from prune_callbacks.calibration.shared_modules import refuse_shared_modules
from prune_callbacks.calibration.stand_ins import (
    BlockInputs,
    HeadReachedError,
    NotAChainError,
    StandIns,
    check_independent,
)


@torch.no_grad()
def capture_inputs(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]) -> list[BlockInputs]:
    """
    Runs the model without its blocks and records the arguments of every block, for all batches.

    During the capture a block does not run: a stand-in returns the hidden states that it received, in a tuple if the
    real block returns one. Only the first block runs, once, which shows the type of its output. The capture also checks
    that the blocks form a chain. What enters a block must be the very object that the stand-in of the block before it
    returned. No block may be called twice. No other argument may depend on what blocks return: the first batch is
    captured a second time, with other returned values, to see that.

    Args:
        model: a causal language model.
        blocks: its decoder blocks, in order.
        batches: token ids, integers of shape (batch, tokens), or mappings of the forward's arguments.

    Raises:
        ValueError: there is no batch, a batch does not fit the model, or the forward reached no block.
        NotAChainError: the blocks do not form a chain.
    """
    return list(capture_one_by_one(model, blocks, batches))


@torch.no_grad()
def capture_one_by_one(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]
) -> Iterator[BlockInputs]:
    """Yields the results of `capture_inputs` batch by batch; the blocks do not run until it is exhausted or closed."""
    refuse_shared_modules(model, blocks)
    stand_ins = StandIns(blocks)
    first: BlockInputs | None = None
    with forwards_replaced(blocks, [stand_ins.of(index) for index in range(len(blocks))]), _without_head(model, blocks):
        for batch in batches:
            captured = stand_ins.capture(model, batch)
            if first is None:
                first = captured
                again = stand_ins.capture(model, batch, change=lambda hidden: hidden.roll(1, -1).neg())
                check_independent(captured, again)
            elif [call is None for call in captured.calls] != [call is None for call in first.calls]:
                raise NotAChainError("it calls other blocks in one batch than in another")
            yield captured
    if first is None:
        raise ValueError("there is no calibration batch; give at least one batch of token ids")


@contextmanager
def _without_head(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Ends forward passes where the output layer of a model of transformers begins; other models run to their end."""
    head = output_layer(model)

    def end(*args: Any, **kwargs: Any) -> Any:
        raise HeadReachedError

    if not isinstance(head, nn.Module) or any(head is module for block in blocks for module in block.modules()):
        yield
        return
    with forwards_replaced([head], [end]):
        yield


@contextmanager
def forwards_replaced(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Temporarily replaces the blocks' `forward`; restores it on exit."""
    before = [block.__dict__.get("forward") for block in blocks]  # accelerate sets one on the instance
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, original in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if original is not None:
                block.forward = original


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states in a block's output, which older decoder layers return in a tuple or a list."""
    # On a tensor, [0] would silently select the first sample of the batch.
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, Tensor)
    return hidden


@torch.no_grad()
def run_block(index: int, block: nn.Module, inputs: BlockInputs, device: torch.device) -> Tensor:
    """
    Runs block `index`; returns its output hidden states, (batch, tokens, hidden). `inputs` is not changed.

    A block that the model does not call leaves the hidden states as they are.
    """
    return (
        inputs.hidden.to(device)
        if inputs.calls[index] is None
        else hidden_of(block_output(index, block, inputs, device))
    )


def block_output(index: int, block: nn.Module, inputs: BlockInputs, device: torch.device) -> Any:
    """
    Runs block `index`, with gradients if they are enabled.

    Returns:
        its output as it is, in a tuple or list if the block makes one.
    """
    call, hidden, place = inputs.calls[index], inputs.hidden.to(device), inputs.place
    assert call is not None
    args, kwargs = to_device(call, device)
    if isinstance(place, int):
        return block(*args[:place], hidden, *args[place:], **kwargs)
    return block(*args, **{place: hidden}, **kwargs)
