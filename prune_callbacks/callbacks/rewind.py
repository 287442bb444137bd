"""Rewind: where the rounds of IterativePrune start again, and the file that holds it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from prune_callbacks.parallel.snapshot import check_snapshot, load_snapshot, save_snapshot


@dataclass(frozen=True)
class Rewind:
    """
    Where every round of `IterativePrune` starts again (Frankle & Carbin 2019; Renda et al. 2020).

    Args:
        step: the finished optimizer steps after which weights and training state are written to a file; 0, the
            initial weights, is the lottery ticket's.
        optimizer: restore the optimizers' and the learning-rate schedulers' state as well; else they go on.
        dirpath: folder of the file; None: the logger's folder, else the trainer's `default_root_dir`.
    """

    step: int
    optimizer: bool = True
    dirpath: str | Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.step, int) or self.step < 0:
            raise ValueError(f"Rewind: step is a number of finished optimizer steps, at least 0, got {self.step}")


class RewindFile:
    """
    The file of one training: written once, when its step is reached, and read at the end of every round.

    `rewind_step_N.pt`, or, where the strategy shards parameters, a folder `rewind_step_N` with a file for every rank.
    """

    def __init__(self, rewind: Rewind) -> None:
        self.rewind = rewind
        self.path: Path | None = None
        self.snapshot = ""

    def write_at_its_step(self, trainer: Trainer) -> None:
        """Writes it, unless that is done or it is too early."""
        if self.path is not None or trainer.global_step < self.rewind.step:
            return
        folder = Path(self.rewind.dirpath or trainer.log_dir or trainer.default_root_dir)
        path = trainer.strategy.broadcast(folder.resolve() / f"rewind_step_{self.rewind.step}")
        self.snapshot = save_snapshot(trainer, path)
        self.path = path

    def go_back(self, trainer: Trainer) -> None:
        """Puts weights and training state back. Raises ValueError if the file is not the one that was written."""
        assert self.path is not None
        load_snapshot(trainer, self.path, self.snapshot, optimizer=self.rewind.optimizer)

    def check(self, trainer: Trainer) -> None:
        """Raises ValueError if the file was written and is not there any more, or another is."""
        if self.path is not None:
            check_snapshot(trainer, self.path, self.snapshot)

    def state_dict(self) -> dict[str, Any]:
        """Its place and what it must hold."""
        return {"path": None if self.path is None else str(self.path), "snapshot": self.snapshot}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse; `Rewind(dirpath=)` says where the file was moved to."""
        self.snapshot = state_dict["snapshot"]
        if state_dict["path"] is not None:
            path = Path(state_dict["path"])
            self.path = path if self.rewind.dirpath is None else Path(self.rewind.dirpath).resolve() / path.name
