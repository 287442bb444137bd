"""Observes the inputs of weights that are used without calling a layer's forward: in a mixer, a module of experts."""

import inspect
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
    A mode in which products `x W^T` with one of the weights call `observe(name, x)`.

    It recognises `F.linear(x, W)`, and `x @ W.T` and `W @ x.T` as operators or as `matmul`, `mm` or `bmm` with two
    positional arguments; it misses `einsum`, `addmm` and others. A weight is identified by its memory address, shape
    and strides. So views of it (an expert of a fused parameter) and transposes are recognised, copies and casts not.

    Args:
        weights: views of shape (out, in), by name.
        observe: is called with the name of the weight and `x`, of shape (..., in).
    """

    def __init__(self, weights: Mapping[str, Tensor], observe: Observe) -> None:
        super().__init__()
        self._known = {weight.data_ptr(): (name, weight.shape, weight.stride()) for name, weight in weights.items()}
        self._observe = observe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            if named["weight"].ndim > 1:  # the weight of a single output may be a vector
                self._see(named["input"], named["weight"].mT)
        elif func in PRODUCTS and len(args) == 2:
            self._see(*args)
        return func(*args, **kwargs)

    def _see(self, left: Tensor, right: Tensor) -> None:
        """Observes a product `left @ right`; either factor may be a weight."""
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
    Observes, inside the `with` block, the products with the weights in the module's forward; see `WeightUses`.

    The mode is limited to this module because it would fail on compiled attention elsewhere in a decoder block.
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
    Observes the products in a module of experts as `watched` does: one product per expert, of real tokens only.

    An expert's input does not say which positions its tokens had. So padding is removed before tokens are routed to
    experts, and the module's output is zero for it. Do not use outputs computed inside this context; the block's own
    output must be computed outside of it.

    Args:
        name: the name of the module, for the error.
        module: the module of experts; its tensor arguments have one row per token.
        weights: views (out, in) of the experts' matrices, by name.
        observe: is called with the name of a matrix and the inputs routed to its expert, (tokens, in).
        real_tokens: returns the mask of real tokens of the running batch, (batch, tokens); None: all are real.

    Raises:
        ValueError: during a forward pass, if the batch has padding and a tensor does not have one row per token.
    """

    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        real = real_tokens()
        with _one_by_one(module), WeightUses(weights, observe):
            return forward(*args, **kwargs) if real is None else _without(real.flatten(), name, forward, args, kwargs)

    with _wrapped(module, around):
        yield


ATTENTION = inspect.signature(functional.multi_head_attention_forward)
OWN_MATRICES = ("in_proj_weight", "q_proj_weight")
"""Arguments of torch's function by which an attention is known."""


@contextmanager
def watched_attention(module: nn.MultiheadAttention, names: Mapping[str, str], observe: Observe) -> Iterator[None]:
    """
    Observes, inside the `with` block, what the four matrices of an attention are multiplied with.

    The attention calls one function of torch, which then runs with the identity as the output's matrix and returns what
    enters that; the real matrix follows. The results are those of the module to the bit.

    Args:
        module: the attention.
        names: the names of the targets by role: "query", "key", "value", "output".
        observe: is called with the name of a target and its inputs, (batch, tokens, in) or (tokens, in).
    """
    original = functional.multi_head_attention_forward

    def see(role: str, x: Tensor) -> None:
        if role in names:
            observe(names[role], x)

    def attend(*args: Any, **kwargs: Any) -> Any:
        given = ATTENTION.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        own = (module.in_proj_weight, module.q_proj_weight)
        if not any(values[key] is not None and any(values[key] is w for w in own) for key in OWN_MATRICES):
            return original(*args, **kwargs)  # of another attention
        turned: dict[int, Tensor] = {}  # one object for one input, so that matrices with the same input share it
        for role in ("query", "key", "value"):
            see(role, turned.setdefault(id(values[role]), _by_batch(values[role])))
        weight, bias = values["out_proj_weight"], values["out_proj_bias"]
        values["out_proj_weight"] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        values["out_proj_bias"] = None
        inner, weights = original(*given.args, **given.kwargs)
        see("output", _by_batch(inner))
        return functional.linear(inner, weight, bias), weights

    functional.multi_head_attention_forward = attend
    try:
        yield
    finally:
        functional.multi_head_attention_forward = original


def _by_batch(x: Tensor) -> Tensor:
    """Turns (tokens, batch, in) into (batch, tokens, in), as the mask of real tokens is; (tokens, in) stays."""
    return x.transpose(0, 1) if x.ndim == 3 else x


def _without(
    real: Tensor, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls `forward` on the rows of real tokens only; returns its output with zeros for the other rows."""

    def rows(value: Any, count: int) -> Any:
        if isinstance(value, Tensor) and (not value.ndim or len(value) != count):
            raise ValueError(
                f"{name} deals {count} tokens to experts, and has a tensor of shape {tuple(value.shape)}, whose "
                "padding rows cannot be identified. Give calibration windows without padding"
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
    """Makes transformers compute experts one after another, each by its own products, instead of grouped."""
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
    """Temporarily replaces the module's `forward` by a call of `around`; restores it on exit."""
    original, own = module.forward, module.__dict__.get("forward")  # accelerate sets one on the instance
    module.forward = lambda *args, **kwargs: around(original, args, kwargs)
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own
