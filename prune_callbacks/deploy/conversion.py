"""Converts the 2:4 layers of a model one by one: finds them, checks each against its dense layer, and replaces it."""

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
from prune_callbacks.anatomy.targets import find_targets, sparse_experts
from prune_callbacks.deploy.backends import Backend, why_not_two_four
from prune_callbacks.results import Result

CHECK_TOKENS = (64, 13)
"""Token counts on which layers are verified; the kernels need multiples of 8 or 16 and pad other counts."""

EXPERTS = "it holds the weights of several layers (experts) in one tensor, and 2:4 kernels take linear layers only"


@dataclass(frozen=True)
class Conversion(Result):
    """
    The result of a conversion.

    Attributes:
        backend: the kernels in use; None if the whole model stayed dense.
        reason: why the whole model stayed dense; None otherwise.
        converted: names of the converted layers.
        skipped: reasons why layers stay dense, by layer name.
        errors: measured relative errors of the outputs of all verified layers, converted or not, by layer name.
        bytes_before: bytes of the converted weights before.
        bytes_after: their bytes on the device now.
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
        size = f"{self.bytes_before / 2**20:.1f} MiB became {self.bytes_after / 2**20:.1f} MiB"
        return f"{len(self.converted)} layers are 2:4 for {self.backend}, {len(self.skipped)} stay dense; {size}"


@runtime_checkable
class Form(Protocol):
    """A sparse form into which linear layers are converted."""

    @property
    def backend(self) -> Backend: ...

    def refusal(self, weight: Tensor) -> str | None:
        """Returns why a 2:4 weight (out, in) cannot have this form; None if it can."""

    def tolerance(self, dtype: torch.dtype) -> float:
        """Returns the relative error that the output of a layer of this dtype may have."""

    def made(self, layer: nn.Linear) -> nn.Module:
        """Returns an equivalent module and leaves `layer` unchanged; raises RuntimeError if the kernels fail."""

    def nbytes(self, made: nn.Module) -> int:
        """Returns the bytes of the converted weight on the device."""

    def install(self, model: nn.Module, name: str, made: nn.Module) -> None:
        """Replaces the layer `name` by `made`, in a way that `revert_` can undo."""


class TwoFour(NamedTuple):
    """The 2:4 layers of a model by name, the reasons why other targets are skipped, and the device of the model."""

    layers: dict[str, nn.Linear]
    skipped: dict[str, str]
    device: torch.device


def find_two_four(model: nn.Module, targets: Sequence[str] | str | None, blocks: str | None) -> TwoFour:
    """
    Finds the targets that can be converted, on any hardware: unshared `nn.Linear` layers with 2:4 weights.

    Args:
        model: the model.
        targets: patterns of layer names; None for all linear layers of the decoder blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.

    Raises:
        ValueError: none of the targets is 2:4, or a layer is converted already.
    """
    done = [name for name, module in model.named_modules() if is_converted(module)]
    if done:
        raise ValueError(f"{len(done)} layers are converted already, first {done[0]}; call revert_(model) first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about shared weights, worded for pruning; `skipped` names them
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
            skipped[name] = f"a {type(layer).__name__} stores its weight as (in, out); 2:4 kernels need nn.Linear"
        elif type(layer) is not nn.Linear:
            skipped[name] = (
                f"a {type(layer).__name__} multiplies in its own way; 2:4 tensors support only that of nn.Linear"
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
            "with NM(2, 4) first, or select its 2:4 layers with targets"
        )
    first = next(iter(found.values())).parameter
    return TwoFour(layers, skipped | dense | experts, first.device)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Returns the names of the layers that own each weight, by the id of the weight."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(module.weight), []).append(name)
    return owners


def convert_layers_(
    model: nn.Module, found: TwoFour, form: Form | None, reason: str | None, *, verify: bool, progress: bool
) -> Conversion:
    """
    Converts the layers of `found` to a sparse form, one by one; those that fail or are inaccurate stay dense.

    With `form` None, which `reason` explains, the model is not changed. Warns about all layers that stay dense.
    """
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
    """Returns the largest |made(x) - layer(x)| / |layer(x)|, in Frobenius norms, over fixed Gaussian inputs."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for tokens in CHECK_TOKENS:
        x = torch.randn(tokens, layer.in_features, generator=generator).to(layer.weight)
        wanted = layer(x).float()
        errors.append((made(x).float() - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return float(torch.stack(errors).max())  # max of tensors, which propagates NaN


def _grouped(reasons: Mapping[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    shown = [f"{n[0]}{f' and {len(n) - 1} more' if n[1:] else ''} ({reason})" for reason, n in groups.items()]
    return "; ".join(shown[:5] + ([f"{len(shown) - 5} other reasons"] if shown[5:] else []))


class StandIn(nn.Module):
    """
    A layer that replaces an `nn.Linear` and keeps the original, with its weight on the CPU.

    The bias remains a parameter. The dense weight is no parameter and in no `state_dict` until `restored`.
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it does not become a submodule
        self.bias = original.bias

    def put_away(self) -> None:
        """Moves the dense weight to the CPU."""
        weight = self._original[0].weight
        weight.data = weight.data.cpu()

    def restored(self) -> nn.Linear:
        """Returns the original layer, moved to the device of this one."""
        (original,) = self._original
        original.weight.data = original.weight.data.to(next(self.buffers()).device)
        original.bias = self.bias
        return original


def is_converted(module: nn.Module) -> bool:
    """Returns whether a layer was converted by `convert_`, `convert_int8_` or `convert_fp8_`."""
    return isinstance(module, StandIn) or isinstance(getattr(module, "weight", None), SparseSemiStructuredTensor)
