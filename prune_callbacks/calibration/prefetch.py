"""Moves blocks to the device that processes them, and copies the next block there ahead of time."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.ranks import Ranks

Tensors = Mapping[str, Tensor]
Visit = tuple[int, str, nn.Module, torch.device]
"""A block at its turn: index, name, module, and the device it is on."""


class Ahead:
    """
    Prefetcher: reads tensors and copies them to a device, on its own thread and CUDA stream, while the device computes.

    Equivalent to reading the tensors when they are taken. It holds one set of tensors at a time, which needs device
    memory in addition to that of the running computation.

    Args:
        where: the device.
    """

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self._stream = torch.cuda.Stream(where) if where.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loading the next block")
        self._begun: Future[dict[str, Tensor]] | None = None

    def begin(self, read: Callable[[], Tensors]) -> None:
        """Starts to read and copy a set of tensors; returns at once."""
        self._begun = self._pool.submit(self._copied, read)

    def take(self) -> dict[str, Tensor] | None:
        """Waits for the tensors of `begin` and returns them; None without a `begin`, or if device memory ran out."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        try:
            tensors = begun.result()
        except torch.OutOfMemoryError:
            return None
        if self._stream is not None:
            for tensor in tensors.values():
                # Keeps the allocator from reusing them on the stream that made them while the current one uses them.
                tensor.record_stream(torch.cuda.current_stream(self.where))
        return tensors

    def close(self) -> None:
        """Waits for a read in progress and ends the thread."""
        self._pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def _copied(self, read: Callable[[], Tensors]) -> dict[str, Tensor]:
        stream: AbstractContextManager[Any] = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream:
            copies = {name: tensor.to(self.where, non_blocking=True) for name, tensor in read().items()}
            if self._stream is not None:
                self._stream.synchronize()  # here, so that the thread that takes them need not wait
        return copies


def overlaps(where: torch.device) -> bool:
    """Returns whether blocks are loaded ahead: on a GPU only, as on a CPU reading would compete with computing."""
    return where.type == "cuda"


@contextmanager
def loading_ahead(where: torch.device) -> Iterator[Ahead | None]:
    """Yields an `Ahead` for a loop over blocks and closes it on exit; None where blocks are not loaded ahead."""
    if not overlaps(where):
        yield None
        return
    ahead = Ahead(where)
    try:
        yield ahead
    finally:
        ahead.close()


def visited(blocks: Sequence[tuple[str, nn.Module]], device: torch.device | None, ranks: Ranks) -> Generator[Visit]:
    """
    Yields every block as (index, name, block, device), on that device; moves it back to its own device afterwards.

    Close the generator where an error may end the loop, so that the current block is moved back then too.

    Args:
        blocks: the model's decoder blocks.
        device: the device to move blocks to, one at a time; None: they stay on their own. While a GPU processes a
            block, the next one is copied to it.
        ranks: if moving a block fails on one rank, all raise ValueError.
    """
    with nullcontext() if device is None else loading_ahead(device) as ahead:
        for index, (name, block) in enumerate(blocks):
            home = next(block.parameters()).device
            where = device or home
            try:
                ranks.attempt(lambda block=block, where=where: _move(block, where, ahead))  # type: ignore[misc]
                if ahead is not None and index < len(blocks) - 1:
                    # Begins after this block has moved, so that weights shared by both blocks are the moved ones.
                    ahead.begin(lambda following=blocks[index + 1][1]: _values(following))  # type: ignore[misc]
                yield index, name, block, where
            finally:
                block.to(home)


def _values(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in block.named_parameters()}


def _move(block: nn.Module, where: torch.device, ahead: Ahead | None) -> None:
    for name, copy in ((ahead and ahead.take()) or {}).items():
        block.get_parameter(name).data = copy
    block.to(where)
