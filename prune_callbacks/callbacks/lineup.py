"""
The callbacks of a trainer, by kind: finds them, and checks their combination, their order and the strategy.

`order.RULES` is the table of rules, and `Lineup.check` is the only check of it. No other module reads
`trainer.callbacks`.
"""

import copy
from typing import TypeVar

from lightning.pytorch import Callback, Trainer
from torch import nn

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.callbacks.kinds import HoldsMasks, PrunesInRounds, PrunesOnce, PruningCallback
from prune_callbacks.callbacks.order import RULES
from prune_callbacks.engine.report import PruneReport
from prune_callbacks.parallel.access import ParamAccess
from prune_callbacks.parallel.strategies import check_strategy, param_access
from prune_callbacks.sparsity import MaskSet

Kind = TypeVar("Kind", bound=Callback)


class Lineup:
    """The callbacks of a trainer, in order. A subclass of a callback counts as that callback."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._callbacks: list[Callback] = trainer.callbacks

    def check(self, callback: PruningCallback) -> None:
        """
        Checks the strategy and the other callbacks for one callback, when a fit begins.

        Raises:
            ValueError: the strategy does not support the callback, or one of its rules (`order.RULES`) is broken.
        """
        check_strategy(self._trainer.strategy, type(callback).__name__, whole_weights=callback.needs_whole_weights)
        for other in self.all(PruningCallback):
            self._check_rules(other)

    def _check_rules(self, callback: PruningCallback) -> None:
        for rule in RULES:
            if _is(callback, (rule.who,)) and (not rule.beside or self._named(rule.beside)):
                part = {"before": self.before(callback), "after": self.after(callback), "anywhere": self}[rule.where]
                found = part._named(rule.kinds)
                holds = {"none": not found, "one": len(found) == 1, "some": bool(found), "at most one": len(found) < 2}
                if not holds[rule.count]:
                    there = self._named((rule.who, *rule.kinds))
                    raise ValueError(rule.text.format(found=there, all=self.names(), wrong=", ".join(found)))

    def all(self, kind: type[Kind]) -> list[Kind]:
        """Returns the callbacks of a kind, in order."""
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

    def names(self) -> list[str]:
        """Returns the class names of the callbacks, in order."""
        return [type(callback).__name__ for callback in self._callbacks]

    def one_shot_report(self) -> PruneReport | None:
        """Returns the report of the callback that prunes once; None if there is none, or it has not pruned."""
        return next((callback.report for callback in self.all(PrunesOnce) if callback.report is not None), None)

    def masks_of_rounds(self) -> MaskSet | None:
        """Returns the masks of the callback that prunes in rounds; None if there is none, or before the fit."""
        return next((callback.masks for callback in self.all(PrunesInRounds) if callback.masks is not None), None)

    def weights(self, masks: MaskSet) -> ParamAccess:
        """Returns the access to the parameters of these masks: the enforcer's if it holds them, else a new one."""
        for enforcer in self.all(HoldsMasks):
            if enforcer.weights is not None and (enforcer.masks is masks or enforcer.masks == masks):
                return enforcer.weights
        return access_to(self._trainer, masks)

    def _named(self, kinds: tuple[str, ...]) -> list[str]:
        return [type(callback).__name__ for callback in self._callbacks if _is(callback, kinds)]

    def _part(self, part: slice) -> "Lineup":
        lineup = copy.copy(self)
        lineup._callbacks = self._callbacks[part]
        return lineup


def access_to(trainer: Trainer, masks: MaskSet) -> ParamAccess:
    """
    Makes the access to masked parameters, by the module object that the masks were made for and not by a prefix.

    Masks with names of the whole module belong to it. Other masks belong to the language model in it, the only trained
    one of several.
    """
    module: nn.Module = trainer.lightning_module
    if not masks.fits(module.named_parameters()):
        model = find_language_model(module)
        module = model if masks.fits(model.named_parameters()) else module
    return param_access(trainer, masks, module)


def _is(callback: Callback, kinds: tuple[str, ...]) -> bool:
    """Returns whether one of the callback's classes has one of these names."""
    return any(kind.__name__ in kinds for kind in type(callback).__mro__)
