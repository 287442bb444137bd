"""Rewind: the training state at which the rounds of IterativePrune start again, and its file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from prune_callbacks.parallel.snapshot import check_snapshot, load_snapshot, save_snapshot


@dataclass(frozen=True)
class Rewind:
    """
    Starts every round of `IterativePrune` from an early training state (Frankle & Carbin 2019; Renda et al. 2020).

    Args:
        step: how many optimizer steps are finished when weights and training state are written to a file. 0 means the
            initial weights, as in the lottery ticket hypothesis.
        optimizer: whether to restore the state of optimizers and learning-rate schedulers too; if not, they continue.
        dirpath: folder of the file; None: the logger's folder, else the trainer's `default_root_dir`.

    Raises:
        ValueError: `step` is no whole number of at least 0.
    """

    step: int
    optimizer: bool = True
    dirpath: str | Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.step, int) or self.step < 0:
            raise ValueError(f"Rewind: step is a number of finished optimizer steps, at least 0, got {self.step}")


class RewindFile:
    """
    The rewind file of one training: written once, when `Rewind.step` is reached, and read at the end of every round.

    The file is `rewind_step_N.pt`. If the strategy shards parameters, it is a folder `rewind_step_N` with a file for
    every rank.
    """

    def __init__(self, rewind: Rewind) -> None:
        self.rewind = rewind
        self.path: Path | None = None
        self.snapshot = ""

    def write_at_its_step(self, trainer: Trainer) -> None:
        """Writes the rewind file, unless it is written or its step is not reached; a collective of the processes."""
        if self.path is not None or trainer.global_step < self.rewind.step:
            return
        folder = Path(self.rewind.dirpath or trainer.log_dir or trainer.default_root_dir)
        path = trainer.strategy.broadcast(folder.resolve() / f"rewind_step_{self.rewind.step}")
        self.snapshot = save_snapshot(trainer, path)
        self.path = path

    def go_back(self, trainer: Trainer) -> None:
        """
        Restores weights and training state.

        Raises:
            ValueError: the file is missing, was written by another training, or is not written yet, which is found out
                here only where the length of an epoch in steps was not known before.
        """
        if self.path is None:
            raise ValueError(
                f"IterativePrune: the first round ends after {trainer.global_step} optimizer steps, and "
                f"Rewind(step={self.rewind.step}) is not reached; rewind to an earlier step"
            )
        load_snapshot(trainer, self.path, self.snapshot, optimizer=self.rewind.optimizer)

    def check(self, trainer: Trainer) -> None:
        """Raises ValueError if the file was written, and is now missing or replaced by the file of another training."""
        if self.path is not None:
            check_snapshot(trainer, self.path, self.snapshot)

    def state_dict(self) -> dict[str, Any]:
        """Returns the path of the rewind file and the name of its snapshot, for the checkpoint."""
        return {"path": None if self.path is None else str(self.path), "snapshot": self.snapshot}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the result of `state_dict`; `Rewind(dirpath=)` names the folder of a file that was moved."""
        self.snapshot = state_dict["snapshot"]
        if state_dict["path"] is not None:
            path = Path(state_dict["path"])
            self.path = path if self.rewind.dirpath is None else Path(self.rewind.dirpath).resolve() / path.name
