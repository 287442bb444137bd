"""Captures the inputs that a model passes to its decoder blocks, and runs one block on them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Batch = Tensor | Mapping[str, Any]


@dataclass
class BlockInputs:
    """
    The inputs of all blocks for one batch.

    Attributes:
        hidden: the hidden states that enter the current block, (batch, tokens, hidden); replaced block by block.
        calls: for every block, its positional arguments (without the hidden states) and its keyword arguments. They
            differ between blocks: sliding attention gets another mask than full attention.
        tokens: True for real tokens, (batch, tokens), if the batch has padding; else None.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    tokens: Tensor | None


class _AllBlocksReachedError(Exception):
    """Ends a forward pass when the last block has been reached."""


@torch.no_grad()
def capture_inputs(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]) -> list[BlockInputs]:
    """
    Runs the model up to its blocks and records the arguments of every block, for all batches.

    The blocks do not run: during the capture each returns the hidden states that it received (in a tuple if the real
    block returns one), and the pass ends at the last block. The first block alone runs once, to see its return type.

    Args:
        model: a causal language model.
        blocks: its decoder blocks, in order.
        batches: token ids, integers of shape (batch, tokens), or mappings with `input_ids`.

    Raises:
        ValueError: there is no batch, a batch has no valid token ids, or the model's forward did not reach every block.
    """
    return list(capture_one_by_one(model, blocks, batches))


@torch.no_grad()
def capture_one_by_one(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]
) -> Iterator[BlockInputs]:
    """Yields the results of `capture_inputs` batch by batch; the blocks do not run until it is exhausted or closed."""
    if isinstance(batches, Tensor):
        raise ValueError(f"batches must be several batches, got one tensor of shape {tuple(batches.shape)}; split it")
    originals = [block.forward for block in blocks]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []
    returns_tuple: list[bool] = []

    def record(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if index == 0:
                entering.append(hidden)
            if not returns_tuple:  # determined once, by the first block; transformers 5 returns tensors, 4 tuples
                returns_tuple.append(isinstance(originals[0](hidden, *rest, **kwargs), tuple))
            calls.append((rest, kwargs))
            if index == len(blocks) - 1:
                raise _AllBlocksReachedError
            return (hidden,) if returns_tuple[0] else hidden

        return forward

    count = 0
    with forwards_replaced(blocks, [record(i) for i in range(len(blocks))]):
        for batch in batches:
            calls.clear()
            entering.clear()
            with suppress(_AllBlocksReachedError):
                run_model(model, batch)
            if len(calls) != len(blocks):
                raise ValueError(
                    f"the forward pass of {type(model).__name__} called {len(calls)} of {len(blocks)} decoder blocks; "
                    'name the list of the blocks that it calls with blocks="..."'
                )
            count += 1
            yield BlockInputs(entering[0], list(calls), _real_tokens(batch))
    if not count:
        raise ValueError("there is no calibration batch; give at least one batch of token ids")


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


def run_model(model: nn.Module, batch: Batch) -> None:
    """Runs a whole forward pass on a batch, on the device of the model's parameters, for the hooks to observe."""
    device = next(model.parameters()).device
    inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, Mapping) else {"input_ids": batch}
    if isinstance(model, PreTrainedModel):
        check_batch(model, batch)
        model(**to_device(inputs, device), use_cache=False)
    elif isinstance(batch, Mapping):
        model(**to_device(inputs, device))
    else:
        model(batch.to(device))


def check_batch(model: PreTrainedModel, batch: Batch) -> None:
    """Raises ValueError for a batch without token ids, or with ids outside the model's embeddings, if known."""
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        found = sorted(inputs) if ids is None else f"{type(ids).__name__} {tuple(getattr(ids, 'shape', ()))}"
        raise ValueError(f"a calibration batch must hold input_ids, integers of shape (batch, tokens); got {found}")
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # a custom model whose embeddings transformers cannot find
        return
    if not isinstance(embedding, nn.Embedding) or not ids.numel():
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= embedding.num_embeddings:
        raise ValueError(
            f"the calibration batches have token ids from {lowest} to {highest}, and {type(model).__name__} has "
            f"embeddings for 0 to {embedding.num_embeddings - 1}: they were made by the tokenizer of another model"
        )


def _real_tokens(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or bool(mask.all()) else mask.bool()


@torch.no_grad()
def run_block(index: int, block: nn.Module, inputs: BlockInputs, device: torch.device) -> Tensor:
    """Runs block `index`; returns its output hidden states, (batch, tokens, hidden). `inputs` is not changed."""
    args, kwargs = to_device(inputs.calls[index], device)
    output = block(inputs.hidden.to(device), *args, **kwargs)
    # Older decoder layers return a tuple. On a tensor, [0] would silently select the first sample of the batch.
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def to_device(value: Any, device: torch.device) -> Any:
    """Returns `value` with every tensor in its tuples, lists and dicts moved to `device`."""
    return change_tensors(value, lambda tensor: tensor.to(device))


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns `value` with `change` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(change_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: change_tensors(item, change) for key, item in value.items()}
    return value
