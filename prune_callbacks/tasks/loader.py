"""A loader of windows that goes on where a checkpoint left it, in an order that ranks share out."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Windows(Dataset[dict[str, Tensor]]):
    """Gives one window at a time, as `{"input_ids": (seq_len,)}`."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}


class Shuffled(DistributedSampler[int]):
    """
    The part of one rank of an order that depends on the seed and the epoch only; Lightning calls `set_epoch`.

    The ranks take turns, so that their batches together are those of one process with a larger batch. Where they do
    not come out even, the first windows of the order are used again. (Of torch's class, so that Lightning leaves it
    as it is.)
    """

    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type]
        mixed = torch.Generator().manual_seed(self.seed)
        seed = int(torch.randint(2**62, (self.epoch + 1,), generator=mixed)[-1])
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        places = torch.arange(self.rank, self.total_size, self.num_replicas) % length
        yield from order[places].tolist()


class ResumableLoader(DataLoader[Any]):
    """
    A loader that goes on where a checkpoint left it, in the middle of an epoch.

    (torchdata's StatefulDataLoader is exact to the end of the epoch, but the epochs after it draw another order than
    in a run that was not interrupted.)
    """

    _given = 0
    _left_at: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # All of this runs when the first batch is asked for: Lightning has named the epoch by then.
        left_at, self._left_at = self._left_at or {}, None
        self._given = left_at["given"] if left_at.get("epoch") == self._epoch else 0
        for batch in islice(super().__iter__(), self._given, None):
            self._given += 1
            yield batch

    @property
    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)

    @property
    def _ranks(self) -> int:
        return getattr(self.sampler, "num_replicas", 1)

    @property
    def _step(self) -> int:
        """How many windows all ranks together take at a time."""
        assert self.batch_size is not None
        return self.batch_size * self._ranks

    def state_dict(self) -> dict[str, int]:
        return {"windows": self._given * self._step, "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if state_dict["step"] != self._step:
            rank_zero_warn(
                f"the checkpoint was trained {state_dict['step']} windows at a time, and now it is {self._step} "
                "(batch_size x processes): the data goes on where it was, but an epoch has another number of steps, by "
                "which training ends (set max_steps) and learning-rate schedules are made"
            )
        self._left_at = {"epoch": state_dict["epoch"], "given": state_dict["windows"] // self._step}
