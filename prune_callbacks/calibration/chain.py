"""Captures the inputs of blocks that form a chain, and compares the chain with a forward pass of the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.calibration.batches import Batch, accepted_inputs, run_model, warn_of_dropped_keys
from prune_callbacks.calibration.capture import capture_inputs, forwards_replaced, hidden_of, run_block
from prune_callbacks.calibration.checks import check_batches, explain
from prune_callbacks.calibration.stand_ins import FAILURES, BlockInputs, NotAChainError, inside


def chain_inputs(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> list[BlockInputs]:
    """
    Captures the inputs of blocks that form a chain; names what the model's forward does not take.

    Raises:
        ValueError: as `capture_inputs`.
        NotAChainError: as `capture_inputs`, or the blocks run one after another compute other hidden states than in a
            forward pass of the model: modules hand each other values in a hidden way.
    """
    check_batches(model, batches)
    warn_of_dropped_keys(model, batches)
    inputs = capture_inputs(model, blocks, batches)
    _check_hidden_states(model, blocks, batches)
    return inputs


@contextmanager
def needing_a_chain(who: str, model: nn.Module) -> Iterator[None]:
    """Explains a NotAChainError in the `with` block, for work that cannot run the model again for every block."""
    try:
        yield
    except NotAChainError as error:
        raise ValueError(
            f"{who} needs decoder blocks that form a chain, each with the hidden states of the one before it. In "
            f"{type(model).__name__} they do not: {error}. prune_sequentially takes such models"
        ) from error


def order_of_execution(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> list[int]:
    """Returns the indices of the blocks in the order of their first calls; those that are not called come last."""
    order = list(dict.fromkeys(calls(model, blocks, batch)))
    if not order:
        raise ValueError(f"the forward pass of {type(model).__name__} calls none of its {len(blocks)} decoder blocks")
    return [*order, *(index for index in range(len(blocks)) if index not in order)]


def calls(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> list[int]:
    """Returns the index of the block of every call in a forward pass, in order."""
    order: list[int] = []
    once = {id(block): index for index, block in reversed(list(enumerate(blocks)))}  # a block may stand there twice

    def noted(index: int) -> Callable[..., Any]:
        original = blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            order.append(index)
            return original(*args, **kwargs)

        return forward

    with forwards_replaced([blocks[index] for index in once.values()], [noted(index) for index in once.values()]):
        try:
            run_model(model, batch)
        except FAILURES as error:
            explain(model, batch, error)
            raise
    return order


SAMPLE = 64
"""Tokens of the windows on which a chain is compared with a forward pass."""


@torch.no_grad()
def _check_hidden_states(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch]) -> None:
    """
    Raises NotAChainError unless blocks that run one after another compute what a forward pass computes.

    Two batches go through every block in turn, as in the engine: whatever a block leaves behind for another one, in an
    attribute of a module, is overwritten by the second.
    """
    whole = [*batches, *batches][:2]
    samples = [_sample(model, batch) for batch in whole]
    try:
        expected = hidden_states(model, dict(enumerate(blocks)), samples[0])
    except torch.OutOfMemoryError:
        raise
    except FAILURES:  # a model that takes windows of one length only
        samples, expected = whole, hidden_states(model, dict(enumerate(blocks)), whole[0])
    inputs = capture_inputs(model, blocks, samples)
    for index, block in enumerate(blocks):
        for batch in reversed(inputs) if index % 2 else inputs:
            batch.hidden = _run(index, block, batch)
        if index in expected and not _close(inputs[0].hidden, expected[index]):
            raise NotAChainError(
                f"block {index}, run after the blocks before it, does not compute what it computes in the whole model: "
                "modules hand each other values in a hidden way"
            )


def _run(index: int, block: nn.Module, batch: BlockInputs) -> Tensor:
    """Runs a block by itself; raises NotAChainError if that fails, or if it writes into what it was given."""
    device = next((parameter.device for parameter in block.parameters()), batch.hidden.device)
    call = batch.calls[index]
    given = [batch.hidden, *(value for value in ([] if call is None else inside(call)) if isinstance(value, Tensor))]
    versions = [tensor._version for tensor in given]
    try:
        output = run_block(index, block, batch, device)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise NotAChainError(f"block {index} does not run by itself ({type(error).__name__}: {error})") from error
    if versions != [tensor._version for tensor in given]:
        raise NotAChainError(f"block {index} writes into its inputs, which it gets several times")
    return output


def _sample(model: nn.Module, batch: Batch) -> Batch:
    """Returns the beginning of the first window of a batch of token ids without padding; other batches as they are."""
    inputs = {key: value for key, value in accepted_inputs(model, batch).items() if isinstance(value, Tensor)}
    ids = inputs.get("input_ids")
    if (
        ids is None
        or ids.ndim != 2
        or ids.is_floating_point()
        or any(value.shape != ids.shape for value in inputs.values())
    ):
        return batch
    if not all(bool(value.all()) for key, value in inputs.items() if key.endswith("mask")):
        return batch
    cut = {key: value[:1, :SAMPLE] for key, value in inputs.items()}
    return cut if isinstance(batch, Mapping) else cut["input_ids"]


def hidden_states(model: nn.Module, blocks: Mapping[int, nn.Module], batch: Batch) -> dict[int, Tensor]:
    """Returns the outputs of blocks in a forward pass of the model, by index; of a repeated block the last."""
    found: dict[int, Tensor] = {}

    def noted(index: int) -> Callable[..., Any]:
        original = blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            found[index] = hidden_of(output).clone()
            return output

        return forward

    with forwards_replaced(list(blocks.values()), [noted(index) for index in blocks]):
        run_model(model, batch)
    return found


def _close(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors agree to rounding; NaN agrees with NaN, which the statistics refuse by layer."""
    if one.shape != other.shape:
        return False
    finite = other.float()[other.isfinite()]
    allowed = max(1e-3, 8 * torch.finfo(other.dtype).eps) * float(finite.square().mean().sqrt()) if len(finite) else 0.0
    return torch.allclose(one.float(), other.float(), rtol=0, atol=allowed, equal_nan=True)
