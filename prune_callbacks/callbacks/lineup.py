"""The callbacks of a trainer, by kind: the one place that looks through `trainer.callbacks`."""

import copy
from typing import TypeVar

from lightning.pytorch import Callback, Trainer

from prune_callbacks.engine.report import PruneReport
from prune_callbacks.pruners import Magnitude, Pruner
from prune_callbacks.sparsity import MaskSet

Kind = TypeVar("Kind", bound=Callback)


class PrunesOnce(Callback):
    """
    A callback that prunes the whole model once, before training.

    Attributes:
        pruner: how.
        report: the result with its masks; None before.
    """

    pruner: Pruner
    report: PruneReport | None


class PrunesInRounds(Callback):
    """
    A callback that prunes while the model is trained.

    Attributes:
        pruner: how, and the pattern to reach.
        masks: the masks in force; None before the fit.
    """

    pruner: Magnitude
    masks: MaskSet | None


class Lineup:
    """The callbacks of a trainer, in order. A subclass counts as its base class."""

    def __init__(self, trainer: Trainer) -> None:
        self._callbacks: list[Callback] = trainer.callbacks

    def all(self, kind: type[Kind]) -> list[Kind]:
        """Returns the callbacks of a kind."""
        return [callback for callback in self._callbacks if isinstance(callback, kind)]

    def first(self, kind: type[Kind]) -> Kind | None:
        """Returns the first callback of a kind, or None."""
        return next(iter(self.all(kind)), None)

    def has(self, *kinds: type[Callback]) -> bool:
        """Returns whether there is a callback of any of these kinds."""
        return any(isinstance(callback, kinds) for callback in self._callbacks)

    def after(self, callback: Callback) -> "Lineup":
        """Returns the callbacks that stand after this one."""
        return self._part(slice(self._callbacks.index(callback) + 1, None))

    def before(self, callback: Callback) -> "Lineup":
        """Returns the callbacks that stand before this one."""
        return self._part(slice(self._callbacks.index(callback)))

    def names(self, *kinds: type[Callback]) -> list[str]:
        """Returns the class names of the callbacks of these kinds, in order; of all callbacks if none is named."""
        return [type(callback).__name__ for callback in self._callbacks if not kinds or isinstance(callback, kinds)]

    def one_shot_report(self) -> PruneReport | None:
        """Returns what the callback that prunes once did; None if there is none, or it has not pruned."""
        return next((callback.report for callback in self.all(PrunesOnce) if callback.report is not None), None)

    def masks_of_rounds(self) -> MaskSet | None:
        """Returns the masks of the callback that prunes in rounds; None if there is none."""
        return next((callback.masks for callback in self.all(PrunesInRounds) if callback.masks is not None), None)

    def _part(self, part: slice) -> "Lineup":
        lineup = copy.copy(self)
        lineup._callbacks = self._callbacks[part]
        return lineup
