"""Ranks: the processes of a job that share work, or a single process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class EverywhereError(Exception):
    """An error that `Ranks.attempt` raises on all ranks as it is, for all of them to handle in the same way."""


class Ranks:
    """
    The processes of a `torch.distributed` group: sums, broadcasts and gathers over them. Every method is a collective.

    Without a group it stands for a single process, and nothing is communicated.

    Args:
        group: a process group, e.g. `torch.distributed.group.WORLD`.
        device: the device that tensors are moved to for communication, if the group's backend (NCCL) serves only that
            device; None: they stay on their own device.
        device_group: a group of the same processes for tensors that are not on the CPU, if `group` does not serve them.

    Attributes:
        rank: the rank of this process in the group.
        size: the number of processes.
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
        """Sums a tensor over the ranks, in place and in its dtype; returns it."""
        if self.size > 1:
            moved = tensor if self.device is None else tensor.to(self.device)
            dist.all_reduce(moved, group=self._group_for(moved))
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def before(self, counts: Tensor) -> Tensor:
        """Returns the sum of the counts of all lower ranks, in the shape of `counts`."""
        table = torch.zeros(self.size, *counts.shape, dtype=counts.dtype, device=counts.device)
        table[self.rank] = counts
        return self.sum(table)[: self.rank].sum(0)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrites a tensor with that of rank `source`; returns it."""
        if self.size > 1:
            moved = tensor.contiguous() if self.device is None else tensor.to(self.device).contiguous()
            dist.broadcast(moved, group=self._group_for(moved), group_src=source)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def _group_for(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self.group if tensor.device.type == "cpu" else self.device_group

    def share(self, value: T, source: int = 0) -> T:
        """Returns the value of rank `source` on every rank; it must be picklable."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.group, group_src=source)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, ordered by rank, on every rank; they must be picklable."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def attempt(self, work: Callable[[], T]) -> T:
        """
        Calls `work` and returns its result on this rank; if it fails on one rank, raises an error on all.

        `work` must not communicate. No rank is left waiting for the one that failed.

        Raises:
            ValueError: on every rank, if `work` failed on any. The rank that failed, and a single process, raise the
                original error instead.
            EverywhereError: as it is, on every rank, if `work` raised one on any, whatever other ranks raised.
        """
        if self.size == 1:
            return work()
        mine: Exception | None = None
        try:
            value = work()
        except Exception as error:
            mine = error
        shown = mine if mine is None or isinstance(mine, EverywhereError) else str(mine) or type(mine).__name__
        problems = self.gather(shown)
        together = next((problem for problem in problems if isinstance(problem, EverywhereError)), None)
        if together is not None:
            raise together
        if mine is not None:
            raise mine
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise ValueError(f"rank {rank}: {problem}")
        return value

    def first(self, work: Callable[[], T]) -> T:
        """
        Calls `work` on rank 0 and returns its result on every rank, which must be picklable; fails on all if it fails.

        `work` must not communicate. Also makes the other ranks wait until it is done.
        """
        made = self.attempt(lambda: [work()] if self.rank == 0 else None)
        shared = self.share(made)
        assert shared is not None
        return shared[0]


ALONE = Ranks()
"""A single process."""


@contextmanager
def patient_ranks(device: torch.device) -> Iterator[Ranks]:
    """
    Yields all processes of the job, in a group whose collectives on the CPU time out after 30 days only.

    Yields `ALONE` for a single process. The long timeout is needed because one layer may take a rank longer than the
    default group's timeout (half an hour). Tensors on a CUDA `device` still go through the default group; call a
    collective on the CPU (`attempt`, `gather`) first, so that the ranks wait for each other there.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield ALONE
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    try:
        yield Ranks(group, device_group=dist.group.WORLD if device.type == "cuda" else None)
    finally:
        dist.destroy_process_group(group)


@contextmanager
def launched_ranks(device: torch.device) -> Iterator[Ranks]:
    """
    Yields the processes that torchrun has started, in a group that ends with the context; `ALONE` without torchrun.

    Args:
        device: the device that this process works on; a GPU is made the current one.

    Raises:
        ValueError: SLURM has started several processes, and torchrun did not.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        raise ValueError(
            f"srun has started {os.environ['SLURM_NTASKS']} processes, which do not know of each other: let srun start "
            "torchrun once per node, and that the processes"
        )
    begun = count > 1 and dist.is_available() and not dist.is_initialized()
    if begun:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with patient_ranks(device) as ranks:
            yield ranks
    finally:
        if begun:
            dist.destroy_process_group()
