"""Capturing what a model hands to its decoder blocks, and running one block on it."""

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
    What every block gets for one batch.

    Attributes:
        hidden: the hidden states that enter the current block, (batch, tokens, hidden); replaced block by block.
        calls: positional (after the hidden states) and keyword arguments of every block. Blocks differ in them:
            a layer with sliding attention gets another mask than one with full attention.
        tokens: True for real tokens, (batch, tokens), where the batch came with padding; else None.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    tokens: Tensor | None


class _AllBlocksReachedError(Exception):
    """Ends a forward pass once the last block was reached."""


@torch.no_grad()
def capture_inputs(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]) -> list[BlockInputs]:
    """
    Runs everything in front of the blocks and records what each block is called with.

    The blocks themselves do not run: for the time of the capture each returns the hidden states that it got
    (in a tuple where the real block returns one), and the pass ends at the last block.

    Raises:
        ValueError: there is no batch, or the model's forward did not reach every block.
    """
    return list(capture_one_by_one(model, blocks, batches))


@torch.no_grad()
def capture_one_by_one(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]
) -> Iterator[BlockInputs]:
    """`capture_inputs`, one batch at a time; until it is exhausted or closed the blocks do not run."""
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
            if not returns_tuple:  # asked of the first block once; transformers 5 returns tensors, 4 tuples
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
                    'name the list of blocks that it runs with blocks="..."'
                )
            count += 1
            yield BlockInputs(entering[0], list(calls), _real_tokens(batch))
    if not count:
        raise ValueError("there is no calibration batch; give at least one batch of token ids")


@contextmanager
def forwards_replaced(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """The blocks do something else for a while."""
    before = [block.__dict__.get("forward") for block in blocks]  # accelerate, for one, sets it on the instance
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
    """A whole forward pass, for what hooks see of it."""
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
    """Raises ValueError for a batch without token ids, or with some that the model's embeddings, if known, lack."""
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        found = sorted(inputs) if ids is None else f"{type(ids).__name__} {tuple(getattr(ids, 'shape', ()))}"
        raise ValueError(f"a calibration batch must hold input_ids, integers of shape (batch, tokens); got {found}")
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # of a model of one's own, whose embeddings have a name of their own
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
    """The hidden states that leave block `index`, on `device`; `inputs` is not changed."""
    args, kwargs = to_device(inputs.calls[index], device)
    output = block(inputs.hidden.to(device), *args, **kwargs)
    # Older decoder layers return a tuple. Of a tensor, [0] would silently be the first sample of the batch.
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in its tuples, lists and dicts on `device`."""
    return change_tensors(value, lambda tensor: tensor.to(device))


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in its tuples, lists and dicts replaced by what `change` makes of it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(change_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: change_tensors(item, change) for key, item in value.items()}
    return value
