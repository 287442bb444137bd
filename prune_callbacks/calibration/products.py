"""Seeing what weights are multiplied with where no layer's forward is called: in a mixer, in a module of experts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Observe = Callable[[str, Tensor], None]
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

PRODUCTS = frozenset({torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm})


class WeightUses(TorchFunctionMode):
    """
    Calls `observe(name, x)` for products `x W^T` with one of the weights.

    Seen are `F.linear(x, W)`, and `x @ W.T` and `W @ x.T` where they are written so or as `matmul`, `mm` or `bmm` with
    the two factors by position; `einsum`, `addmm` and others are not. A weight is known by where its values lie, so
    views of it (an expert of a fused parameter) and transposes are recognised; copies and casts are not.

    Args:
        weights: views (out, in), by name.
        observe: gets `x`, of shape (..., in).
    """

    def __init__(self, weights: Mapping[str, Tensor], observe: Observe) -> None:
        super().__init__()
        self._known = {weight.data_ptr(): (name, weight.shape, weight.stride()) for name, weight in weights.items()}
        self._observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            if named["weight"].ndim > 1:  # of a single output the weight may be a vector
                self._see(named["input"], named["weight"].mT)
        elif func in PRODUCTS and len(args) == 2:
            self._see(*args)
        return func(*args, **kwargs)

    def _see(self, left: Tensor, right: Tensor) -> None:
        """A product `left right`, either of which may be a weight."""
        if right.ndim > 1:
            self._see_weight(left, right.mT)
        if left.ndim > 1 and right.ndim > 1:
            self._see_weight(right.mT, left)

    def _see_weight(self, x: Tensor, weight: Tensor) -> None:
        if weight.ndim == 3 and x.ndim == 3 and len(x) == len(weight):
            for rows, matrix in zip(x, weight, strict=True):
                self._see_weight(rows, matrix)
            return
        name, shape, stride = self._known.get(weight.data_ptr(), ("", None, None))
        if weight.shape == shape and weight.stride() == stride:
            self._observe(name, x)


@contextmanager
def watched(module: nn.Module, weights: Mapping[str, Tensor], observe: Observe) -> Iterator[None]:
    """
    While inside, products with the weights are seen where the module's forward makes them.

    Only there: a mode that saw all of a block would meet compiled attention.
    """

    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with WeightUses(weights, observe):
            return forward(*args, **kwargs)

    with _wrapped(module, around):
        yield


@contextmanager
def watched_experts(
    name: str,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    observe: Observe,
    real_tokens: Callable[[], Tensor | None],
) -> Iterator[None]:
    """
    As `watched`, for a module of experts: one product an expert, and only of real tokens.

    The tokens that reach an expert no longer tell where they stood, so padding is taken out before they are dealt to
    experts; in the module's output it is zero. That is an output to look away from: the block's own must be made
    outside of this.

    Args:
        name: of the module, for the error.
        module: has the experts; its arguments are tensors with one row a token.
        weights: views (out, in) of experts' matrices, by name.
        observe: gets the rows that reach an expert, (tokens, in).
        real_tokens: True for real tokens, (batch, tokens), of the batch that is running; None: all are.

    Raises:
        ValueError: while running, if there is padding and an argument is not one row a token.
    """

    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        real = real_tokens()
        with _one_by_one(module), WeightUses(weights, observe):
            return forward(*args, **kwargs) if real is None else _without(real.flatten(), name, forward, args, kwargs)

    with _wrapped(module, around):
        yield


def _without(
    real: Tensor, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    def rows(value: Any, count: int) -> Any:
        if isinstance(value, Tensor) and (not value.ndim or len(value) != count):
            raise ValueError(
                f"{name} deals {count} tokens to experts, and has a tensor of shape {tuple(value.shape)}: which of its "
                "rows are padding is not known. Give calibration windows without padding"
            )
        return value

    def picked(value: Any) -> Any:
        return rows(value, len(real))[real] if isinstance(value, Tensor) else value

    output = forward(*map(picked, args), **{key: picked(value) for key, value in kwargs.items()})
    whole = output.new_zeros(len(real), *output.shape[1:])
    whole[real] = rows(output, int(real.sum()))
    return whole


@contextmanager
def _one_by_one(module: nn.Module) -> Iterator[None]:
    """Experts computed one after another, each by products of its own, where transformers would group them."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "_experts_implementation"):
        yield
        return
    before = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before


@contextmanager
def _wrapped(module: nn.Module, around: Around) -> Iterator[None]:
    original, own = module.forward, module.__dict__.get("forward")  # accelerate, for one, sets it on the instance
    module.forward = lambda *args, **kwargs: around(original, args, kwargs)
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own
