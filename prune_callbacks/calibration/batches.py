"""Passes a calibration batch to a model's forward: all that the forward accepts, and nothing else."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Number
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.blocks import is_sequence_to_sequence


class OwnStep:
    """
    A batch together with the function that runs it, for modules that make of their batches what only they know.

    Args:
        batch: the batch, of any kind.
        run: runs a model on the batch, on the device of the model: a step of a LightningModule, for example.
        seed: of torch's random numbers in every run, so that repeated runs draw the same.
    """

    def __init__(self, batch: Any, run: Callable[[nn.Module, Any], object], seed: int = 0) -> None:
        self.batch = batch
        self.tokens: Tensor | None = None
        self._run = run
        self._seed = seed

    def __call__(self, model: nn.Module) -> None:
        """Runs the model on the batch."""
        device = device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            self._run(model, to_device(self.batch, device))

    def note_padding(self, model: nn.Module) -> None:
        """Runs a model of transformers once, and keeps the attention mask that its forward gets, if it has padding."""

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.tokens = real_tokens(kwargs)

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            self(model)
        finally:
            hook.remove()


Batch = Tensor | Mapping[str, Any] | OwnStep

TARGETS = ("labels", "decoder_labels")
"""Keys that a loss needs and the layers do not."""


def named_inputs(batch: Any) -> Batch:
    """
    Returns a batch as a tensor or a mapping: the only element of a tuple or list; a named tuple by its names.

    Raises:
        ValueError: the batch is a tuple or list of several values, which have no names, numbers that are no tensor, or
            something else.
    """
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Tensor | OwnStep):
        return batch
    if isinstance(batch, Mapping):  # transformers' BatchEncoding is a Mapping, but no dict
        return dict(batch)
    inner = batch
    while isinstance(inner, tuple | list) and inner:
        inner = inner[0]
    if isinstance(inner, Number) or hasattr(batch, "__array__"):
        raise ValueError(
            f"a calibration batch is a {type(batch).__name__} of numbers: numbers must be a tensor of shape (batch, "
            "tokens), e.g. torch.tensor([[5, 6, 7]]), or the result of tokenizer(texts, return_tensors='pt')"
        )
    if isinstance(batch, str):
        raise ValueError(
            f"a calibration batch must be token ids, got the text {batch[:40]!r}. If it is a key of one batch that is "
            "a mapping, put that batch into a list, since the batches must be several"
        )
    if isinstance(batch, tuple | list):
        found = ", ".join(type(value).__name__ for value in batch)
        raise ValueError(
            f"a calibration batch is a {type(batch).__name__} of {len(batch)} values ({found}), which have no names: "
            "one may be the attention mask, without which padding would count as text. Give mappings, such as "
            '{"input_ids": ..., "attention_mask": ...}, from the data set or as batches=, or say by forward= how the '
            "model runs on a batch"
        )
    raise ValueError(
        "a calibration batch must be token ids, or a mapping with the arguments of the model's forward, such as "
        f"input_ids; got {type(batch).__name__}"
    )


def accepted_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """
    Returns what a model's forward gets of a batch, by argument name, still on its device.

    Token ids alone are `input_ids`. Of a mapping, everything that the forward names is passed. Labels are left out
    unless the model is one of sequences to sequences, which makes its decoder's inputs from them or whose padding they
    show, or its forward demands them.
    """
    if isinstance(batch, OwnStep):
        return {}
    if not isinstance(batch, Mapping):
        return {"input_ids": batch}
    parameters = _parameters(model)
    known = _known(model)
    shifts = is_sequence_to_sequence(model)
    wanted = {
        key for key in TARGETS if shifts or (key in parameters and parameters[key].default is inspect.Parameter.empty)
    }
    return {
        key: value
        for key, value in batch.items()
        if (known is None or key in known) and (key not in TARGETS or key in wanted)
    }


def dropped_keys(model: nn.Module, batches: Iterable[Batch]) -> list[str]:
    """Returns the keys in the batches that the model's forward does not accept, except labels."""
    known = _known(model)
    if known is None:
        return []
    keys = {key: None for batch in batches if isinstance(batch, Mapping) for key in batch}
    return [key for key in keys if key not in known and key not in TARGETS]


def warn_of_dropped_keys(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Names once what the model does not get of the batches."""
    dropped = dropped_keys(model, batches)
    if dropped:
        warnings.warn(
            f"the calibration batches hold {', '.join(map(repr, dropped))}, which the forward of "
            f"{type(model).__name__} does not accept: left out",
            stacklevel=3,
        )


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _takes(model: nn.Module, name: str) -> bool:
    """Returns whether a forward can be called with an argument of that name."""
    parameters = _parameters(model)
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _known(model: nn.Module) -> set[str] | None:
    """Returns the arguments that a forward names; None if it takes any."""
    known: set[str] = set()
    for forward in _forwards(model):
        names, rest = named_arguments(forward)
        known |= names
        if rest is None:
            return known
        if not isinstance(model, PreTrainedModel):
            return None
        if get_args(rest.annotation):
            return known
    return known


def named_arguments(forward: Callable[..., Any]) -> tuple[set[str], inspect.Parameter | None]:
    """
    Returns the arguments that a forward names, and its `**kwargs`, if any.

    Among the names are those in the annotation of `**kwargs`: transformers describes there what else its models take,
    such as the lengths of packed sequences.
    """
    parameters = inspect.signature(forward).parameters.values()
    rest = next((parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD), None)
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    described = () if rest is None else get_args(rest.annotation)
    return names.union(*(getattr(kind, "__annotations__", {}) for kind in described)), rest


def _forwards(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yields the forward of a model, and those of its base classes, to which one may hand its keywords on."""
    yield model.forward
    for base in type(model).__mro__[1:]:
        own = vars(base).get("forward")
        if own is not None and issubclass(base, PreTrainedModel):
            yield own


@torch.no_grad()
def run_model(model: nn.Module, batch: Batch) -> None:
    """Runs a whole forward pass on a batch, on the device of the model's parameters, for the hooks to observe."""
    if isinstance(batch, OwnStep):
        batch(model)
        return
    device = device_of(model)
    if not isinstance(model, PreTrainedModel) and isinstance(batch, Tensor):
        model(batch.to(device))
        return
    inputs = to_device(accepted_inputs(model, batch), device)
    if isinstance(model, PreTrainedModel) and _takes(model, "use_cache"):
        inputs["use_cache"] = False
    model(**inputs)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of a model's parameters that have values; streaming loads a few at a time."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def real_tokens(batch: Batch) -> Tensor | None:
    """Returns the attention mask as bools, (batch, tokens); None if all tokens are real."""
    if isinstance(batch, OwnStep):
        return batch.tokens
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or mask.ndim != 2 or bool(mask.all()) else mask.bool()


def to_device(value: Any, device: torch.device) -> Any:
    """Returns `value` with every tensor in its tuples, lists and dicts moved to `device`."""
    return change_tensors(value, lambda tensor: tensor.to(device))


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns `value` with `change` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change_tensors(item, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(change_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: change_tensors(item, change) for key, item in value.items()}
    return value
