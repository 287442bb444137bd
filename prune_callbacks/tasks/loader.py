"""Training data that resumes from a checkpoint, in an order that is shared by all ranks."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Windows(Dataset[dict[str, Tensor]]):
    """A dataset of windows (windows, seq_len); items are `{"input_ids": (seq_len,)}`."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}


class Shuffled(DistributedSampler[int]):
    """
    A sampler that yields one rank's part of a shuffled order, which depends on the seed and the epoch only.

    Lightning calls `set_epoch`. The ranks take turns, so that their batches together equal those of one process with a
    larger batch. If the windows cannot be divided evenly, the first ones of the order are used again. The class
    inherits from torch's sampler so that Lightning does not replace it.
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
    A loader that resumes at the next batch after a checkpoint, also in the middle of an epoch.

    torchdata's StatefulDataLoader is exact up to the end of the epoch, but later epochs have another order than in a
    run without interruption.
    """

    _given = 0
    _left_at: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: runs when the first batch is requested, after Lightning has set the epoch.
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
        """Returns the number of windows that all ranks take in one step."""
        assert self.batch_size is not None
        return self.batch_size * self._ranks

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch, the number of windows used in it, and the windows per step of all ranks."""
        return {"windows": self._given * self._step, "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores the position; warns if the number of windows per step has changed."""
        if state_dict["step"] != self._step:
            rank_zero_warn(
                f"the checkpoint was trained {state_dict['step']} windows at a time, and now it is {self._step} "
                "(batch_size x processes): the data resumes at the same window, but an epoch has another number of "
                "steps, which changes the end of training (set max_steps) and learning-rate schedules"
            )
        self._left_at = {"epoch": state_dict["epoch"], "given": state_dict["windows"] // self._step}


class ResumableData(LightningDataModule):
    """
    A data module whose training resumes after the batches of a checkpoint, also in the middle of an epoch.

    Args:
        batch_size: items per training batch of each rank.
        seed: seed that shuffles the training data.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self._loader: ResumableLoader | None = None
        self._left_at: dict[str, int] | None = None

    def _shuffled(self, dataset: Dataset[Any]) -> ResumableLoader:
        """Returns a loader of this rank's part of a shuffled dataset, which resumes where a loaded checkpoint ended."""
        ranks = {"num_replicas": 1, "rank": 0}
        if self.trainer is not None and self.trainer.world_size > 1:
            ranks = self.trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
        sampler = Shuffled(dataset, ranks["num_replicas"], ranks["rank"], seed=self.seed)
        # Without its own generator, a loader draws a number from the global one, which dropout uses too.
        self._loader = ResumableLoader(dataset, self.batch_size, sampler=sampler, generator=torch.Generator())
        if self._left_at is not None:
            self._loader.load_state_dict(self._left_at)
        return self._loader

    # Lightning restores the state of a loader only if none was made before the checkpoint is read, but it needs one to
    # estimate the length of the training. The state of a data module is restored early enough.
    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the training data, for the checkpoint."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position in the training data from a checkpoint."""
        self._left_at = state_dict or None
        if self._loader is not None and self._left_at is not None:  # some strategies restore after the loader is made
            self._loader.load_state_dict(self._left_at)
