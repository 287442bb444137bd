"""Blocks on the device where they are worked on, the next one being copied there meanwhile."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.ranks import Ranks

Tensors = Mapping[str, Tensor]


class Ahead:
    """
    Reads tensors and copies them to a device, on a thread and a stream of its own, while something else runs there.

    Equivalent to reading them when they are taken. One set at a time; in memory it is besides what is worked on.

    Args:
        where: the device.
    """

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self._stream = torch.cuda.Stream(where) if where.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loading the next block")
        self._begun: Future[dict[str, Tensor]] | None = None

    def begin(self, read: Callable[[], Tensors]) -> None:
        """Starts to read; returns at once."""
        self._begun = self._pool.submit(self._copied, read)

    def take(self) -> dict[str, Tensor] | None:
        """What was begun, once it is there; None if nothing was, or there was no room for it beside what is in work."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        try:
            tensors = begun.result()
        except torch.OutOfMemoryError:
            return None
        if self._stream is not None:
            for tensor in tensors.values():
                # They were made on another stream: not to be given to it again before this one is done with them.
                tensor.record_stream(torch.cuda.current_stream(self.where))
        return tensors

    def close(self) -> None:
        """Waits for what is being read, and ends the thread."""
        self._pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def _copied(self, read: Callable[[], Tensors]) -> dict[str, Tensor]:
        stream: AbstractContextManager[Any] = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream:
            copies = {name: tensor.to(self.where, non_blocking=True) for name, tensor in read().items()}
            if self._stream is not None:
                self._stream.synchronize()  # this thread waits, so that whoever takes them need not
        return copies


def overlaps(where: torch.device) -> bool:
    """Whether blocks are loaded ahead: on a GPU. On the CPU reading would take cores and memory from computing."""
    return where.type == "cuda"


@contextmanager
def loading_ahead(where: torch.device) -> Iterator[Ahead | None]:
    """An `Ahead` for as long as blocks are gone through; None where nothing is gained by one."""
    if not overlaps(where):
        yield None
        return
    ahead = Ahead(where)
    try:
        yield ahead
    finally:
        ahead.close()


def visited(
    blocks: Sequence[tuple[str, nn.Module]], device: torch.device | None, ranks: Ranks
) -> Generator[tuple[int, str, nn.Module, torch.device]]:
    """
    Every block with its number, its name and the device on which it is meanwhile; afterwards it is back where it was.

    Args:
        blocks: of the model.
        device: where they are moved, one at a time; None: they stay. To a GPU the next one is copied meanwhile.
        ranks: all fail together if moving fails on one.

    Close it where an error may end the loop: the block that it is at then goes home, too.
    """
    with nullcontext() if device is None else loading_ahead(device) as ahead:
        for index, (name, block) in enumerate(blocks):
            home = next(block.parameters()).device
            where = device or home
            try:
                ranks.attempt(lambda block=block, where=where: _move(block, where, ahead))  # type: ignore[misc]
                if ahead is not None and index < len(blocks) - 1:
                    # Not before this block is there: weights that both have are to be those that are changed here.
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
