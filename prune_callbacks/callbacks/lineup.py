"""
The callbacks of a trainer, by kind: finds them, and checks their combination, their order and the strategy.

`order.RULES` is the table of rules, and `Lineup.begins_fit` is the only check of it. No other module reads
`trainer.callbacks`.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim.swa_utils import AveragedModel

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.callbacks.import_names import check_import_names
from prune_callbacks.callbacks.kinds import HoldsMasks, PrunesInRounds, PrunesOnce, PruningCallback
from prune_callbacks.callbacks.order import AVERAGES, RULES
from prune_callbacks.callbacks.trial import KeptWeights
from prune_callbacks.engine.report import PruneReport
from prune_callbacks.parallel.access import ParamAccess
from prune_callbacks.parallel.strategies import check_strategy, param_access
from prune_callbacks.sparsity import MaskSet

Kind = TypeVar("Kind", bound=Callback)


class AfterAll(Callback):
    """
    Stands after all callbacks of a fit, and does what has to come last; leaves when the fit ends or fails.

    Attributes:
        kept: the weights to put back after a trial run, also after one that failed; None: this is no trial run.
        check: called when the fit has ended, after every other callback.
        undo: called last, also after a fit that failed.
        on_checkpoint: called with every checkpoint before it is written, after every other callback.
    """

    def __init__(self) -> None:
        self.kept: KeptWeights | None = None
        self.check: Callable[[], None] = lambda: None
        self.undo: Callable[[], None] = lambda: None
        self.on_checkpoint: Callable[[dict[str, Any]], None] = lambda checkpoint: None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.kept is not None:
            self.kept.add(pl_module)  # what configure_model has made

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.on_checkpoint(checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        try:
            self.check()
        finally:
            self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        Lineup(trainer).remove(self)
        if self.kept is not None:
            self.kept.put_back()
        self.undo()


class Lineup:
    """The callbacks of a trainer, in order. A subclass of a callback counts as that callback."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._callbacks: list[Callback] = trainer.callbacks

    def begins_fit(self, callback: PruningCallback, stage: str) -> bool:
        """
        Returns whether a fit begins that a callback takes part in, and checks the strategy and the other callbacks.

        A callback takes no part in the search of a `Tuner`. In another trial run (`fast_dev_run`, `overfit_batches`)
        it does, and afterwards the module gets back the weights that it has now.

        Raises:
            ValueError: the strategy does not support the callback, one of its rules (`order.RULES`) is broken, or the
                trainer or another callback is of `pytorch_lightning` and not of `lightning.pytorch`.
        """
        check_import_names(type(callback).__name__, self._trainer, self._callbacks)
        if stage == "fit" and self._searches() and self.first(PruningCallback) is callback:
            rank_zero_info("the Tuner searches on the model as it is: nothing is pruned, and no adapters are added")
        if stage != "fit" or self._searches():
            return False
        check_strategy(self._trainer.strategy, type(callback).__name__, whole_weights=callback.needs_whole_weights)
        for other in self.all(PruningCallback):
            self._check_rules(other)
        why = self.trial()
        if why is not None and self.after_all().kept is None:
            kept = self.after_all().kept = KeptWeights(why)
            kept.add(self._trainer.lightning_module)
        return True

    def trial(self) -> str | None:
        """Returns what makes this fit a trial run, which changes and measures nothing for good; None if it is none."""
        if self._searches():
            return "Tuner"
        if self._trainer.fast_dev_run:
            return "fast_dev_run"
        return "overfit_batches" if self._trainer.overfit_batches else None

    def _searches(self) -> bool:
        """Returns whether a `Tuner` runs this fit, which ends when the search ends, before any training."""
        finders = [*self.all(LearningRateFinder), *self.all(BatchSizeFinder)]
        return any(finder._early_exit for finder in finders)

    def after_all(self) -> "AfterAll":
        """Returns the callback that comes after all others until the fit ends; adds it if there is none."""
        if not self.has(AfterAll):
            self._callbacks.append(AfterAll())
        return self.all(AfterAll)[0]

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

    def remove(self, callback: Callback) -> None:
        """Removes a callback."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def others(self) -> list[str]:
        """Returns the class names of callbacks that are neither this package's nor Lightning's, besides averages."""
        ours = ("prune_callbacks.", "lightning.pytorch.")
        return [
            type(callback).__name__
            for callback in self._callbacks
            if not type(callback).__module__.startswith(ours) or _is(callback, AVERAGES)
        ]

    def averages(self) -> Iterator[nn.Module]:
        """Yields the models in which callbacks, or the module itself, keep averages of its weights."""
        for callback in self._callbacks:
            for value in vars(callback).values():
                if isinstance(value, AveragedModel):
                    yield value.module
                elif isinstance(value, nn.Module) and _is(callback, AVERAGES):
                    yield value
        for module in self._trainer.lightning_module.modules():
            if isinstance(module, AveragedModel):
                yield module.module

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
