"""Converting the 2:4 layers of a model one by one: found, checked against the dense ones, put in their place."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.finding import find_targets, sparse_experts
from prune_callbacks.deploy.backends import Backend, why_not_two_four
from prune_callbacks.results import Result

CHECK_TOKENS = (64, 13)
"""Layers are verified on this many tokens: the kernels want multiples of 8 or 16 and pad the rest."""

EXPERTS = "it holds the weights of several layers (experts) in one tensor, and 2:4 kernels take linear layers only"


@dataclass(frozen=True)
class Conversion(Result):
    """
    What a conversion did.

    Attributes:
        backend: the kernels in use, None if the model stayed dense as a whole.
        reason: why it did.
        converted: names of the layers that are sparse now.
        skipped: why a layer is not, by name.
        errors: the output's measured relative error of the layers that were verified, kept or not, by name.
        bytes_before: what the converted weights took.
        bytes_after: what they take on the device now.
    """

    backend: Backend | None
    reason: str | None = None
    converted: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        if self.backend is None:
            return f"the model stays dense: {self.reason}"
        size = f"{self.bytes_before / 2**20:.1f} MiB are {self.bytes_after / 2**20:.1f} now"
        return f"{len(self.converted)} layers are 2:4 for {self.backend}, {len(self.skipped)} stay dense; {size}"


@runtime_checkable
class Form(Protocol):
    """A sparse form of a layer."""

    @property
    def backend(self) -> Backend: ...

    def refusal(self, weight: Tensor) -> str | None:
        """Why a 2:4 weight cannot have this form; None if it can."""

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative error that the output of a layer of this dtype may have."""

    def made(self, layer: nn.Linear) -> nn.Module:
        """A module that computes what the layer does, which is not changed. RuntimeError where the kernels fail."""

    def nbytes(self, made: nn.Module) -> int:
        """What its weight takes on the device."""

    def install(self, model: nn.Module, name: str, made: nn.Module) -> None:
        """Puts it in the place of the layer; `revert_` must find the way back."""


class TwoFour(NamedTuple):
    """The layers of a model that are 2:4, and why the others of the targets are not to be converted."""

    layers: dict[str, nn.Linear]
    skipped: dict[str, str]
    device: torch.device


def find_two_four(model: nn.Module, targets: Sequence[str] | str | None, blocks: str | None) -> TwoFour:
    """
    The targets that may be converted; the conversion's first step, on any machine.

    Raises:
        ValueError: none of the targets is 2:4, or the model is converted already.
    """
    done = [name for name, module in model.named_modules() if is_converted(module)]
    if done:
        raise ValueError(f"{len(done)} layers are converted already, first {done[0]}; call revert_(model) before")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shared weights, in words for pruning; they are named below
        found = find_targets(find_blocks(model, blocks), targets)
    experts = dict.fromkeys(sparse_experts(find_blocks(model, blocks), targets), EXPERTS)
    owners = _owners(model)
    layers: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    dense: dict[str, str] = {}
    for name, target in found.items():
        layer = target.module
        others = [other for other in owners[id(target.parameter)] if other != name]
        if not isinstance(layer, nn.Linear):
            skipped[name] = f"a {type(layer).__name__} stores its weight as (in, out); 2:4 kernels want nn.Linear"
        elif type(layer) is not nn.Linear:
            skipped[name] = (
                f"a {type(layer).__name__} multiplies in its own way, and 2:4 tensors know that of nn.Linear"
            )
        elif others:
            skipped[name] = f"shares its weight with {others[0]}"
        elif (reason := why_not_two_four(layer.weight.detach())) is not None:
            dense[name] = reason
        else:
            layers[name] = layer
    if len(dense) == len(found):
        raise ValueError(
            f"nothing to convert, none of the {len(found)} layers is 2:4: {_grouped(dense | experts)}. Prune the model "
            "with NM(2, 4) first, or name the layers that are with targets"
        )
    first = next(iter(found.values())).parameter
    return TwoFour(layers, skipped | dense | experts, first.device)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names under which a weight is in the model, by its identity; a layer that is used twice has two."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(module.weight), []).append(name)
    return owners


def convert_layers_(
    model: nn.Module, found: TwoFour, form: Form | None, reason: str | None, *, verify: bool, progress: bool
) -> Conversion:
    """Gives the layers found the sparse form, one by one; with none, for `reason`, the model stays as it is."""
    if form is None:
        conversion = Conversion(None, reason, skipped=found.skipped)
        warnings.warn(str(conversion), stacklevel=3)
        return conversion
    converted: list[str] = []
    skipped, errors = dict(found.skipped), dict[str, float]()
    before = after = 0
    for name in track(found.layers, f"2:4 for {form.backend}", disable=not progress, transient=True):
        layer = found.layers[name]
        refusal = form.refusal(layer.weight)
        try:
            made = None if refusal is not None else form.made(layer)
            if made is not None and verify:
                errors[name], allowed = relative_error(made, layer), form.tolerance(layer.weight.dtype)
                if not errors[name] <= allowed:
                    refusal = f"its output is off by {errors[name]:.2g} of the norm, where {allowed:.2g} is allowed"
        except RuntimeError as error:  # NotImplementedError and out of memory are among them
            refusal = f"{type(error).__name__}: {error}"
        if refusal is not None or made is None:
            skipped[name] = str(refusal)
            continue
        converted.append(name)
        before, after = before + layer.weight.nbytes, after + form.nbytes(made)
        form.install(model, name, made)
    if skipped:
        total = len(skipped) + len(converted)
        warnings.warn(f"{len(skipped)} of {total} layers stay dense: {_grouped(skipped)}", stacklevel=3)
    conversion = Conversion(form.backend, None, tuple(converted), skipped, errors, before, after)
    logging.getLogger(__name__).info("%s", conversion)
    return conversion


@torch.no_grad()
def relative_error(made: nn.Module, layer: nn.Linear) -> float:
    """The largest |made(x) - layer(x)| / |layer(x)|, in Frobenius norms, over the same Gaussian inputs in every run."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for tokens in CHECK_TOKENS:
        x = torch.randn(tokens, layer.in_features, generator=generator).to(layer.weight)
        wanted = layer(x).float()
        errors.append((made(x).float() - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return float(torch.stack(errors).max())  # of tensors: a NaN stays one


def _grouped(reasons: Mapping[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    shown = [f"{n[0]}{f' and {len(n) - 1} more' if n[1:] else ''} ({reason})" for reason, n in groups.items()]
    return "; ".join(shown[:5] + ([f"{len(shown) - 5} other reasons"] if shown[5:] else []))


class StandIn(nn.Module):
    """
    A layer in the place of an `nn.Linear`, which it remembers, its weight on the CPU.

    The bias stays a parameter; the weight is none, and in no `state_dict`, until `restored`.
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule
        self.bias = original.bias

    def put_away(self) -> None:
        """Moves the dense weight to the CPU."""
        weight = self._original[0].weight
        weight.data = weight.data.cpu()

    def restored(self) -> nn.Linear:
        """The layer as it was, on the device where its stand-in is."""
        (original,) = self._original
        original.weight.data = original.weight.data.to(next(self.buffers()).device)
        original.bias = self.bias
        return original


def is_converted(module: nn.Module) -> bool:
    """Whether a layer is one that a conversion of this package made."""
    return isinstance(module, StandIn) or isinstance(getattr(module, "weight", None), SparseSemiStructuredTensor)
