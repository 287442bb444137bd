"""What callbacks know of each other: by kind, without importing each other's modules."""

import warnings
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import Callback, Trainer

from prune_callbacks.engine.report import PruneReport
from prune_callbacks.parallel.access import ParamAccess
from prune_callbacks.pruners import Pruner
from prune_callbacks.sparsity import MaskSet


def renamed(who: str, old: str, old_value: str | Path | None, new: str, value: str | Path | None) -> str | Path | None:
    """Returns the value of an argument that has a new name; one given by its old name is taken, with a warning."""
    if old_value is None:
        return value
    warnings.warn(f"{who}: {old}= is now {new}=; the old name goes in the next release", FutureWarning, stacklevel=3)
    return old_value


class PruningCallback(Callback):
    """
    A callback of this package.

    Attributes:
        needs_whole_weights: whether it works only where every process holds all weights.
    """

    needs_whole_weights: ClassVar[bool] = False


class PrunesOnce(PruningCallback):
    """
    A callback that prunes the whole model once, before training.

    Attributes:
        pruner: how.
        report: the result with its masks; None before.
    """

    pruner: Pruner
    report: PruneReport | None


class PrunesInRounds(PruningCallback):
    """
    A callback that prunes while the model is trained.

    Attributes:
        pruner: how, and the pattern to reach.
        masks: the masks in force; None before the fit.
    """

    pruner: Pruner
    masks: MaskSet | None


class HoldsMasks(PruningCallback):
    """
    A callback that holds masks on the weights in every step.

    Attributes:
        masks: in force; None before training.
        weights: the access to the masked parameters; None before training.
    """

    masks: MaskSet | None
    weights: ParamAccess | None


class FinishesWeights(PruningCallback):
    """A callback whose last change of the weights must be made before they are measured and saved."""

    def finish(self, trainer: Trainer) -> None:
        """Makes the change; does nothing when called again in the same fit."""
        raise NotImplementedError
