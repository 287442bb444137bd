"""What callbacks know of each other: by kind, without importing each other's modules."""

from typing import ClassVar

from lightning.pytorch import Callback, Trainer

from prune_callbacks.engine.report import PruneReport
from prune_callbacks.parallel.access import ParamAccess
from prune_callbacks.pruners import Pruner
from prune_callbacks.sparsity import MaskSet


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
