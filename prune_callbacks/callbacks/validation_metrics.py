"""Measures what a module logs in its own validation, aside from training."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import sized_len
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torchmetrics import Metric

from prune_callbacks.callbacks.calibration_batches import same_draws
from prune_callbacks.callbacks.lightning_internals import before_setup_of
from prune_callbacks.callbacks.untouched import untouched

OTHERWISE = "give a data module with evaluation_windows, on which perplexity is measured"


def check_validation(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raises ValueError if the module has no validation in this fit; says what is missing."""
    who, source = type(pl_module).__name__, _loop(trainer)._data_source
    missing = None
    if not is_overridden("validation_step", pl_module, LightningModule):
        missing = f"{who} has no validation_step: add one that logs them with self.log"
    elif not source.is_defined():
        made = type(source.instance).__name__
        missing = f"{made} has no val_dataloader: add one, or pass val_dataloaders= to fit"
    elif trainer.limit_val_batches == 0:
        missing = "the trainer runs no validation (limit_val_batches=0): leave that out"
    if missing is not None:
        raise ValueError(f"RunReport measures the module's own validation metrics, and {missing}. Or {OTHERWISE}")


def validation_metrics(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """
    Returns what a module logs in its own validation, by name, in the order in which it is logged.

    Equivalent to `Trainer.validate` of the module on the validation data of the running fit, also before the fit has
    begun, and without a trace in module, trainer or loggers (see `untouched`). Callbacks take no part. Every rank runs
    all batches, so values are those of one process.

    Args:
        trainer: the trainer of a fit.
        pl_module: the module.

    Raises:
        ValueError: the module has no validation in this fit, gives its batches once, or its data is made in its own
            `setup`, which has not run yet.
    """
    check_validation(trainer, pl_module)
    results = _ResultCollection(training=False)
    validation = _Validation(trainer, pl_module, results)
    with ExitStack() as stack:
        stack.enter_context(on_its_device(trainer, pl_module))
        stack.enter_context(_validating(trainer, results))
        stack.enter_context(untouched(trainer, pl_module, validation.log))
        loader = stack.enter_context(_loader(trainer, pl_module))
        for metric in pl_module.modules():
            if isinstance(metric, Metric):  # every rank has seen all batches
                metric.sync_on_compute = metric._to_sync = False
        stack.enter_context(_early(trainer, pl_module, "validation"))
        return validation.run(loader)


class _Validation:
    """
    Runs the validation of a module: its hooks and steps as Lightning's own loop calls them.

    Args:
        trainer: the trainer.
        pl_module: the module, whose `log` calls `log` of this object.
        results: collects what is logged.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, results: _ResultCollection) -> None:
        self._trainer, self._module, self._results = trainer, pl_module, results
        self._found: dict[str, float] = {}

    def run(self, loader: CombinedLoader) -> dict[str, float]:
        """Returns the values of all batches of the loader."""
        several = loader._mode == "sequential" and len(loader.flattened) > 1
        self._call("on_validation_start")
        self._call("on_validation_epoch_start")
        for batch, batch_idx, dataloader_idx in loader:
            place = dataloader_idx if several else None
            if place != self._results.dataloader_idx:
                self._collect()
            self._batch(batch, batch_idx, dataloader_idx, () if place is None else (place,))
        self._collect()
        self._results.dataloader_idx = None
        self._call("on_validation_epoch_end")
        self._collect()
        self._call("on_validation_end")
        return self._found

    def _batch(self, batch: Any, batch_idx: int, dataloader_idx: int, place: tuple[int, ...]) -> None:
        convert, precision = _precision(self._trainer, self._module)
        batch = self._module._on_before_batch_transfer(convert(batch), dataloader_idx=dataloader_idx)
        batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
        self._results.batch, self._results.batch_size = batch, None
        self._results.dataloader_idx = place[0] if place else None
        numbered = is_param_in_hook_signature(self._module.validation_step, "batch_idx", min_args=2)
        self._call("on_validation_batch_start", batch, batch_idx, *place)
        with precision():
            output = self._call("validation_step", batch, *((batch_idx,) if numbered else ()), *place)
        self._call("on_validation_batch_end", output, batch, batch_idx, *place)
        self._results.batch = self._results.batch_size = None

    def _call(self, hook: str, *args: Any) -> Any:
        self._module._current_fx_name = hook
        return getattr(self._module, hook)(*args)

    def log(self, name: str, value: Any, **settings: Any) -> None:
        """Takes what the module logs, with the arguments of `LightningModule.log`."""
        if not isinstance(value, Metric):
            value = cast(Any, self._module)._LightningModule__to_tensor(value, name)  # checks that it is one number
        others = {"sync_dist", "sync_dist_group", "rank_zero_only"}  # every rank has seen all batches
        given = {key: setting for key, setting in settings.items() if setting is not None and key not in others}
        # Synchronised by a function that does nothing, or Lightning would recommend to do so.
        self._results.log(self._module._current_fx_name, name, value, sync_dist=True, **given)

    def _collect(self) -> None:
        """Adds the values of the batches since the loader began."""
        values = self._trainer._logger_connector.update_eval_epoch_metrics()
        self._found.update({name: float(value) for name, value in values.items() if value.numel() == 1})


def _loop(trainer: Trainer) -> _EvaluationLoop:
    """Returns the validation loop of a fit."""
    return trainer.fit_loop.epoch_loop.val_loop


@contextmanager
def _loader(trainer: Trainer, pl_module: LightningModule) -> Iterator[CombinedLoader]:
    """Yields the validation data of the fit, as much of it as the trainer takes; it draws the same again afterwards."""
    source = _loop(trainer)._data_source
    with _early(trainer, source.instance, "val_dataloader"):
        given = source.dataloader()
    loader = CombinedLoader(
        *((given.iterables, given._mode) if isinstance(given, CombinedLoader) else (given, "sequential"))
    )
    if not source.is_module() and any(isinstance(part, Iterator) for part in loader.flattened):
        raise ValueError("the validation data is an iterator, which gives every batch once: validate on a loader")
    lengths = [float("inf") if (length := sized_len(part)) is None else length for part in loader.flattened]
    limit = trainer.limit_val_batches
    loader.limits = [_parse_num_batches(RunningStage.VALIDATING, length, limit) for length in lengths]
    with ExitStack() as stack:
        for part in loader.flattened:
            stack.enter_context(same_draws(part))
        yield loader


def _early(trainer: Trainer, source: Any, makes: str) -> AbstractContextManager[None]:
    """Adds to an error that the module's own `setup` has not run yet, as long as that may be so."""
    early = trainer.fit_loop._combined_loader is None  # there is none until training begins
    return before_setup_of(source, makes, OTHERWISE) if early else nullcontext()


@contextmanager
def _validating(trainer: Trainer, results: _ResultCollection) -> Iterator[None]:
    """Shows the module a trainer that validates, with what it has logged so far in `trainer.callback_metrics`."""
    stage, loop, connector = trainer.state.stage, _loop(trainer), trainer._logger_connector
    kept, before = dict(vars(connector)), loop._results
    trainer.state.stage, loop._results, connector._first_loop_iter = RunningStage.VALIDATING, results, None
    for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics"):
        setattr(connector, name, dict(kept[name]))
    try:
        yield
    finally:
        vars(connector).update(kept)
        trainer.state.stage, loop._results = stage, before


def _precision(trainer: Trainer, pl_module: LightningModule) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """Returns how the trainer's precision changes a batch and a step; not at all before it has converted the module."""
    plugin = trainer.precision_plugin
    dtype = plugin.convert_input(torch.zeros(())).dtype
    if any(parameter.dtype == dtype for parameter in pl_module.parameters()):
        return plugin.convert_input, plugin.val_step_context
    return lambda batch: batch, nullcontext


@contextmanager
def on_its_device(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Moves a module to the trainer's device and back: in setup and after the fit it is on the CPU."""
    home, device = next(module.parameters()).device, trainer.strategy.root_device
    if home.type != device.type:
        module.to(device)
    try:
        yield
    finally:
        if home.type != device.type:
            module.to(home)
