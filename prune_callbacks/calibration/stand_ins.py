"""Stand-ins for decoder blocks, which record how a model calls its blocks and whether these form a chain."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.calibration.batches import Batch, run_model
from prune_callbacks.calibration.checks import explain
from prune_callbacks.calibration.pairs import Masks, masks_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of a block, without the hidden states."""

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum, FunctionType)
"""Types of arguments that a block cannot change, besides tensors, tuples, and lists and dicts of its own."""

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a forward raises if it needs from its blocks what stand-ins do not give."""


class NotAChainError(ValueError):
    """The blocks of a model do not form a chain, in which each gets the hidden states of the one before it."""


@dataclass
class BlockInputs:
    """
    The inputs of all blocks for one batch.

    Attributes:
        hidden: the hidden states that enter the current block, (batch, tokens, hidden); replaced block by block.
        calls: for every block, its positional arguments (without the hidden states) and its keyword arguments; None for
            a block that is not called. They differ between blocks: sliding attention gets another mask than full
            attention.
        tokens: True for real tokens, (batch, tokens), if the batch has padding; else None. Of a sequence-to-sequence
            model those of the encoder.
        place: the position or the keyword of the hidden states among the arguments of every block.
        beside: the masks of the other sequence of a sequence-to-sequence model.
    """

    hidden: Tensor
    calls: list[Call | None]
    tokens: Tensor | None
    place: int | str = 0
    beside: Masks = ()

    @property
    def masks(self) -> Masks:
        """Returns the masks of all sequences in the batch; () if all tokens are real."""
        return () if self.tokens is None and not self.beside else (self.tokens, *self.beside)


class HeadReachedError(BaseException):
    """Ends a forward pass in front of the output layer."""


class StandIns:
    """
    Stand-ins for the forwards of blocks, which record their arguments and return the hidden states that entered.

    Args:
        blocks: the decoder blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._forwards = [block.forward for block in blocks]
        self._place: int | str | None = None
        self._dress: Callable[[Tensor], Any] | None = None  # makes what the real block returns of hidden states
        self._begin(lambda hidden: hidden)

    def _begin(self, change: Callable[[Tensor], Tensor]) -> None:
        self._calls: list[Call | None] = [None] * len(self._forwards)
        self._entering: Tensor | None = None
        self._returned: Tensor | None = None
        self._last = -1
        self._change = change

    def capture(
        self, model: nn.Module, batch: Batch, change: Callable[[Tensor], Tensor] = lambda hidden: hidden
    ) -> BlockInputs:
        """Runs a forward pass; the stand-ins return the hidden states with `change` applied."""
        self._begin(change)
        try:
            with suppress(HeadReachedError):
                run_model(model, batch)
        except (NotAChainError, torch.OutOfMemoryError):
            raise
        except FAILURES as error:
            explain(model, batch, error)
            if self._last < 0:
                raise
            raise NotAChainError(
                f"after block {self._last} its forward fails without what the blocks return "
                f"({type(error).__name__}: {error})"
            ) from error
        finally:
            self._returned = None
        if self._entering is None:
            raise ValueError(
                f"the forward pass of {type(model).__name__} called 0 of {len(self._forwards)} decoder blocks; "
                'name the list of the blocks that it calls with blocks="..."'
            )
        assert self._place is not None
        masks = masks_of(batch)
        return BlockInputs(self._entering, self._calls, masks[0] if masks else None, self._place, masks[1:])

    def of(self, index: int) -> Callable[..., Any]:
        """Returns the stand-in of a block."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._calls[index] is not None:
                raise NotAChainError(f"it calls block {index} twice")
            if index < self._last:
                raise NotAChainError(f"it calls block {index} after block {self._last}")
            hidden = self._hidden(index, args, kwargs)
            if self._dress is None:
                version = hidden._version
                self._dress = dress_like(self._forwards[index](*args, **kwargs), hidden)
                if hidden._version != version:
                    raise NotAChainError(f"block {index} writes into its inputs, which it gets several times")
            self._calls[index] = _without(self._place, args, kwargs)
            self._last = index
            self._returned = self._change(hidden).detach()  # another object, so that it can be told from the argument
            return self._dress(self._returned)

        return forward

    def _hidden(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Finds the hidden states among the arguments of a block; they must be what the block before it returned."""
        named: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        if self._returned is None:
            floats = [k for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()]
            place = "hidden_states" if "hidden_states" in kwargs else next(iter(floats), None)
            if place is None:
                raise NotAChainError(f"block {index} gets no hidden states")
            self._place = place if self._place is None else self._place
            self._entering = named.get(self._place)
            if not isinstance(self._entering, Tensor):
                raise NotAChainError(f"block {index} gets its hidden states in another argument than in other batches")
            return self._entering
        places = [place for place, value in named.items() if value is self._returned]
        if not places:
            raise NotAChainError(f"what enters block {index} is not what block {self._last} returned")
        if len(places) > 1:
            raise NotAChainError(f"block {index} gets what block {self._last} returned in several arguments")
        if places[0] != self._place:
            raise NotAChainError(f"block {index} gets its hidden states in another argument than block {self._last}")
        return self._returned


def dress_like(output: Any, hidden: Tensor) -> Callable[[Tensor], Any]:
    """Returns a function that makes a block's output of hidden states; NotAChainError if a stand-in cannot."""
    several = type(output) in (tuple, list) and len(output) > 0
    first = output[0] if several else output
    if not isinstance(first, Tensor):
        raise NotAChainError(f"its blocks return a {type(output).__name__}")
    if first.shape != hidden.shape:
        raise NotAChainError(f"its blocks make {tuple(first.shape)} of {tuple(hidden.shape)}")
    if not several:
        return lambda hidden: hidden
    rest = [None if value is None else _Withheld() for value in output[1:]]
    return lambda hidden: type(output)([hidden, *rest])


class _Withheld:
    """Stands for what a block returns besides the hidden states; a model that passes it on has no chain of blocks."""


def _without(place: int | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Returns the arguments of a block without its hidden states."""
    if isinstance(place, int):
        return (*args[:place], *args[place + 1 :]), kwargs
    return args, {key: value for key, value in kwargs.items() if key != place}


def check_independent(captured: BlockInputs, again: BlockInputs) -> None:
    """
    Raises NotAChainError if a block gets more of other blocks than the hidden states.

    Either an argument changed with what the stand-ins returned, or blocks get one object that they could write into.
    """
    handed: dict[int, int] = {}
    for index, call in enumerate(captured.calls):
        for value in inside(call) if call is not None else ():
            if isinstance(value, _Withheld):
                raise NotAChainError(f"block {index} gets more of the blocks before it than the hidden states")
            if not isinstance(value, (Tensor, tuple, list, dict, *CONSTANTS)):
                raise NotAChainError(
                    f"block {index} gets a {type(value).__name__}, by which blocks could hand each other values"
                )
            if isinstance(value, list | dict) and handed.setdefault(id(value), index) != index:
                raise NotAChainError(
                    f"blocks {handed[id(value)]} and {index} get the same {type(value).__name__}, by which they could "
                    "hand each other values"
                )
    for index, (one, other) in enumerate(zip(captured.calls, again.calls, strict=True)):
        if (one is None) != (other is None):
            raise NotAChainError(f"whether it calls block {index} depends on what other blocks return")
        if not _equal(one, other):
            raise NotAChainError(f"block {index} gets more of the blocks before it than the hidden states")


def inside(call: Call) -> Iterator[Any]:
    """Yields the arguments of a call and all that their tuples, lists and dicts hold."""
    left = [*call[0], *call[1].values()]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, tuple | list | dict):
            left += value.values() if isinstance(value, dict) else value


def _equal(one: Any, other: Any) -> bool:
    """Returns whether two arguments hold the same values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return one is other or (isinstance(one, CONSTANTS) and bool(one == other))
