"""Runs a module's own steps aside from training, and leaves no trace of them."""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from prune_callbacks.calibration.sources import evaluating

OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""Attributes in which torch keeps the parameters, buffers, submodules and hooks of a module."""

LOG = inspect.signature(LightningModule.log)


def _ignore(name: str, value: Any, **settings: Any) -> None:
    """Takes what a module logs, and does nothing with it."""


@contextmanager
def untouched(trainer: Trainer, pl_module: LightningModule, on_log: Callable[..., None] = _ignore) -> Iterator[None]:
    """
    Runs a module's own steps (`training_step`, `validation_step`) aside from training.

    Inside, the module is in evaluation mode and gradients are off. What it logs by `log` and `log_dict` goes to
    `on_log`, also where Lightning's own `log` raises, as in `setup`; its loggers take everything and write nothing.

    On exit, also after an error, all is bit for bit as before: the mode of every module, buffers (such as the running
    statistics of `BatchNorm`), the states of `torchmetrics`, attributes that are tensors, numbers, texts, lists, dicts
    or sets, also nested ones, the gradients of parameters, and the random states of Python, numpy and torch. Values of
    parameters are not put back, so pruning inside lasts. What a step changes inside other objects (a file, an object
    of its own class) stays changed. The module has to be on the same device at the end as at the beginning.

    Args:
        trainer: the trainer of the fit; it need not run a loop.
        pl_module: the module.
        on_log: called as `on_log(name, value, **settings)` with the arguments of `LightningModule.log`, by name.
    """
    with ExitStack() as stack:
        stack.enter_context(_random_states())
        stack.enter_context(_gradients(pl_module))
        stack.enter_context(_kept(pl_module))
        stack.enter_context(_loggers(trainer))
        stack.enter_context(evaluating(pl_module))
        stack.enter_context(torch.no_grad())
        # In place of the class's own methods; _kept removes them. log_dict of the class calls this log.
        vars(pl_module).update(log=partial(_log, on_log, pl_module), print=lambda *args, **settings: None)
        yield


def _log(on_log: Callable[..., None], pl_module: LightningModule, *args: Any, **settings: Any) -> None:
    """Calls `on_log` with the arguments of `LightningModule.log`, those after the first two by name."""
    given = LOG.bind(pl_module, *args, **settings).arguments
    del given["self"]
    on_log(given.pop("name"), given.pop("value"), **given)


@contextmanager
def _random_states() -> Iterator[None]:
    """Restores the random states of Python, numpy and torch, also after an error."""
    isolated = isolate_rng()
    isolated.__enter__()
    try:
        yield
    finally:
        isolated.__exit__(None, None, None)  # given an error, it would restore nothing


@contextmanager
def _gradients(module: nn.Module) -> Iterator[None]:
    """Takes the gradients away and puts them back."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _loggers(trainer: Trainer) -> Iterator[None]:
    """Puts loggers that write nothing in place of the trainer's."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Puts back the buffers and the attributes of a module and its submodules."""
    weights = {_storage(parameter) for parameter in module.parameters()} - {None}
    back: dict[int, Callable[[], None]] = {}
    for part in module.modules():
        attributes = _attributes(part)
        for value in (part._buffers, *attributes.values()):
            _keep(value, weights, back)
        back[id(part)] = partial(_put_attributes_back, part, attributes)
    try:
        yield
    finally:
        with torch.no_grad():
            for put_back in back.values():
                put_back()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module, without those of torch and those that hold weights."""
    return {name: value for name, value in vars(module).items() if name not in OF_TORCH and not _holds_weights(value)}


def _put_attributes_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in _attributes(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)  # setattr of a torchmetrics.Metric refuses some names


def _keep(value: Any, weights: set[int | None], back: dict[int, Callable[[], None]]) -> None:
    """
    Adds to `back` how to restore a tensor or a container in place, and everything in it.

    Args:
        value: any value; what is neither a tensor nor a container needs nothing, since its name is put back.
        weights: the storages of parameters, whose values may change.
        back: the functions that restore, by the `id` of what they restore.
    """
    if id(value) in back or _holds_weights(value):
        return
    match value:
        case Tensor() if _has_own_values(value, weights):
            back[id(value)] = partial(_put_values_back, value, value.clone())
        case dict():
            back[id(value)] = partial(_refill, value, value.update, dict(value))
        case set():
            back[id(value)] = partial(_refill, value, value.update, set(value))
        case list() | deque():
            back[id(value)] = partial(_refill, value, value.extend, list(value))
    for part in _inside(value):
        _keep(part, weights, back)


def _inside(value: Any) -> Iterable[Any]:
    """Returns the values in a container; nothing for another value."""
    match value:
        case dict():
            return list(value.values())
        case list() | deque() | tuple():
            return value
    return ()


def _holds_weights(value: Any) -> bool:
    """Returns whether a value is a parameter or a module, or contains one."""
    return any(isinstance(part, nn.Parameter | nn.Module) for part in (value, *_inside(value)))


def _has_own_values(tensor: Tensor, weights: set[int | None]) -> bool:
    """Returns whether a tensor has values that can be put back, apart from those of the weights."""
    if tensor.requires_grad:
        return False  # made from weights
    if tensor.layout != torch.strided:
        return True
    expanded = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not expanded and _storage(tensor) not in weights


def _storage(tensor: Tensor) -> int | None:
    """Returns what identifies the memory of a tensor, on the meta device too; None for a sparse one."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def _put_values_back(tensor: Tensor, values: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()):  # only there may a tensor that was made there be written
        tensor.copy_(values)


def _refill(container: Any, fill: Callable[[Any], None], values: Any) -> None:
    container.clear()
    fill(values)
