"""Ranks: the processes of a job that share work, or one process by itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """
    Sums, broadcasts and errors over the processes of a `torch.distributed` group; every method is a collective.

    Without a group, one process by itself: nothing is communicated.

    Args:
        group: a process group, e.g. `torch.distributed.group.WORLD`.
        device: where tensors are communicated, if the group's backend serves that one only (NCCL's); None: where they
            are.
        device_group: the same processes, for tensors that are not on the CPU, if `group` does not serve these.

    Attributes:
        rank: this process's place in the group.
        size: how many there are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        device_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group = group
        self.device_group = group if device_group is None else device_group
        self.device = device
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up over the ranks, in place and in the tensor's dtype."""
        if self.size > 1:
            moved = tensor if self.device is None else tensor.to(self.device)
            dist.all_reduce(moved, group=self._group_for(moved))
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def before(self, counts: Tensor) -> Tensor:
        """The sum of the counts of all lower ranks."""
        table = torch.zeros(self.size, *counts.shape, dtype=counts.dtype, device=counts.device)
        table[self.rank] = counts
        return self.sum(table)[: self.rank].sum(0)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrites the tensor with that of rank `source`."""
        if self.size > 1:
            moved = tensor.contiguous() if self.device is None else tensor.to(self.device).contiguous()
            dist.broadcast(moved, group=self._group_for(moved), group_src=source)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def _group_for(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self.group if tensor.device.type == "cpu" else self.device_group

    def share(self, value: T, source: int = 0) -> T:
        """The value of rank `source`, which must be picklable."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.group, group_src=source)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def attempt(self, work: Callable[[], T]) -> T:
        """
        What `work`, which communicates with nobody, returned on this rank.

        Raises:
            ValueError: on every rank, when it failed on any: none is left waiting for it. (On one rank by itself, and
                on the rank that failed, the error is its own.)
        """
        if self.size == 1:
            return work()
        mine: Exception | None = None
        try:
            value = work()
        except Exception as error:
            mine = error
        problems = self.gather(None if mine is None else str(mine) or type(mine).__name__)
        if mine is not None:
            raise mine
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise ValueError(f"rank {rank}: {problem}")
        return value


ALONE = Ranks()
"""One process by itself."""


@contextmanager
def patient_ranks(device: torch.device) -> Iterator[Ranks]:
    """
    All processes of the job, if there are several; on the CPU they wait for each other as long as it takes.

    One layer may take a rank longer than the default group's timeout (half an hour). Tensors on a CUDA `device` go
    through the default group, so let a collective on the CPU (`attempt`, `gather`) come before.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield ALONE
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    try:
        yield Ranks(group, device_group=dist.group.WORLD if device.type == "cuda" else None)
    finally:
        dist.destroy_process_group(group)
