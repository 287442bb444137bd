"""Base classes by which callbacks recognise each other without importing each other's modules."""

import warnings
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import Callback, Trainer

from prune_callbacks.engine.report import PruneReport
from prune_callbacks.parallel.access import ParamAccess
from prune_callbacks.pruners import Pruner
from prune_callbacks.sparsity import MaskSet


def renamed(who: str, old: str, old_value: str | Path | None, new: str, value: str | Path | None) -> str | Path | None:
    """Returns the value of a renamed argument; a value given by the old name is used, with a FutureWarning."""
    if old_value is None:
        return value
    if value is not None:
        raise ValueError(f"{who}: {old}= is the old name of {new}=; give one of them")
    warnings.warn(f"{who}: {old}= is now {new}=; the next release removes the old name", FutureWarning, stacklevel=3)
    return old_value


class PruningCallback(Callback):
    """
    The base class of this package's callbacks.

    Attributes:
        needs_whole_weights: whether the callback works only if every process holds all weights.
    """

    needs_whole_weights: ClassVar[bool] = False


class PrunesOnce(PruningCallback):
    """
    A callback that prunes the whole model once, before training.

    Attributes:
        pruner: the pruner.
        report: the result, with the masks; None before pruning.
    """

    pruner: Pruner
    report: PruneReport | None


class PrunesInRounds(PruningCallback):
    """
    A callback that prunes while the model is trained.

    Attributes:
        pruner: the pruner, with the pattern to reach.
        masks: the masks in force; None before the fit.
    """

    pruner: Pruner
    masks: MaskSet | None


class HoldsMasks(PruningCallback):
    """
    A callback that holds masks on the weights in every step.

    Attributes:
        masks: the masks in force; None before training.
        weights: the access to the masked parameters; None before training.
    """

    masks: MaskSet | None
    weights: ParamAccess | None


class FinishesWeights(PruningCallback):
    """A callback that changes the weights a last time when training ends, before they are measured and saved."""

    def finish(self, trainer: Trainer) -> None:
        """Makes the last change of the weights; does nothing when called again in the same fit."""
        raise NotImplementedError
