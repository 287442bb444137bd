"""The settings of one pruning at the beginning of a fit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from prune_callbacks.allocation.protocol import Allocation
from prune_callbacks.callbacks.own_step import Forward
from prune_callbacks.engine.sequential import Order
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import needs_calibration
from prune_callbacks.reconstruction.settings import BlockReconstruction, short


@dataclass(frozen=True)
class OneShotSettings:
    """The arguments of `OneShotPrune`, which explains them, as they are when a fit begins."""

    pruner: Pruner
    batches: Iterable[Any] | None
    num_batches: int | None
    written_windows: int
    targets: Sequence[str] | str | None
    blocks: str | Sequence[str] | None
    forward: Forward | None
    order: Order
    allocation: Allocation | None
    reconstruction: BlockReconstruction | None
    dirpath: str | Path | None
    min_expert_tokens: int
    progress: bool

    @classmethod
    def of(cls, callback: Any) -> "OneShotSettings":
        """Returns the settings of a callback that has them as attributes."""
        return cls(**{setting.name: getattr(callback, setting.name) for setting in fields(cls)})

    def for_trial(self) -> "OneShotSettings":
        """Returns the settings of a trial run: one batch, a short reconstruction, and nothing is written."""
        return replace(self, num_batches=1, written_windows=0, reconstruction=short(self.reconstruction), dirpath=None)

    @property
    def calibrated(self) -> bool:
        """Returns whether the pruner, the allocation or the reconstruction needs calibration batches."""
        return self.reconstruction is not None or any(
            needs_calibration(part) for part in (self.pruner, self.allocation) if part is not None
        )
