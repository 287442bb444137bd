"""ParamAccess: masks on what one rank holds of a module's parameters, whatever strategy keeps them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_callbacks.parallel.packed import PackedKeep, count_removed, zero_removed
from prune_callbacks.parallel.shapes import whole_shape
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.sparsity import MaskSet


class Span(NamedTuple):
    """The places of a flattened parameter, from `start` to before `stop`, whose master copy a rank holds."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many places."""
        return self.stop - self.start


class ParamAccess(ABC):
    """
    Masked parameters of a module: their weights, the master copies that the optimizer steps, gradients and moments.

    Each rank masks its span of every parameter by its span of the mask, one bit per weight; nothing is communicated
    but by the methods that say so. Parameters are looked up by name at every call, so that a module whose parameters
    were replaced (cast, moved, wrapped again) is served as well.

    A family of strategies says what a rank holds: the methods that begin with an underscore and follow the constructor.

    Args:
        module: holds the parameters, under names that `masks` knows.
        masks: the masks to hold.
        optimizers: the torch optimizers that make the steps.
        ranks: the processes over which each parameter is spread.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: MaskSet,
        optimizers: Iterable[Optimizer] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self._module = module
        self._device = next(module.parameters()).device if ranks.device is None else ranks.device
        self._optimizers = list(optimizers)
        self.masks = masks
        self.ranks = ranks
        self._prepare()
        self._places = self._bound()
        self._keep = {}
        for name, parameter in self._parameters().items():
            weights = self._master(parameter)
            if weights is not None:
                self._keep[name] = PackedKeep(masks.packed(name), *self._span(parameter), weights.device)

    @abstractmethod
    def _span(self, parameter: Tensor) -> Span:
        """The places whose master copy this rank holds."""

    @abstractmethod
    def _owner(self, parameter: Tensor) -> Tensor | None:
        """The tensor in the optimizer's groups that holds the span; None where this rank holds nothing."""

    @abstractmethod
    def _piece(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """The span in a local tensor of the owner's layout: the owner itself, or one of its moments; a view."""

    @abstractmethod
    def _gradient(self, parameter: Tensor) -> Tensor | None:
        """The span's gradient, complete and not yet clipped; a view. None if there is none."""

    def _copies(self, parameter: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """Weights that are no master: what forward passes use, where that is another tensor; views."""
        return iter(())

    def _counts(self, parameter: Tensor) -> bool:
        """Whether this rank holds something, and speaks for it: other ranks may hold the same."""
        return True

    def _prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Called before parameters are looked up."""

    def _bound(self) -> dict[str, str]:
        """Finds the name of every mask's parameter in the module."""
        named = dict(self._module.named_parameters())
        trained = {name for name, parameter in named.items() if parameter.requires_grad}
        return self.masks.places({name: whole_shape(parameter) for name, parameter in named.items()}, trained)

    def _parameter(self, name: str) -> Tensor:
        try:
            return self._module.get_parameter(self._places[name])
        except AttributeError:  # a wrapper (an adapter) was put around the layer since, or taken off
            self._places = self._bound()
            return self._module.get_parameter(self._places[name])

    def _parameters(self) -> dict[str, Tensor]:
        self._prepare()
        return {name: self._parameter(name) for name in self.masks}

    def _master(self, parameter: Tensor) -> Tensor | None:
        owner = self._owner(parameter)
        return None if owner is None else self._piece(parameter, owner)

    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights, so that they enter neither the clipping norm nor the moments."""
        for name, parameter in self._parameters().items():
            if name in self._keep:
                gradient = self._gradient(parameter)
                if gradient is not None:
                    zero_removed(gradient, self._keep[name].unpacked())

    def after_step(self, optimizer: Optimizer) -> None:
        """Zeroes the pruned weights in the master copies that a step of this optimizer has changed."""
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for name, parameter in self._parameters().items():
            owner = self._owner(parameter)
            if owner is not None and id(owner) in stepped:
                zero_removed(self._piece(parameter, owner), self._keep[name].unpacked())

    def project(self) -> None:
        """Zeroes the pruned weights everywhere: masters, the copies in use, and the optimizer's moments."""
        for name, parameter in self._parameters().items():
            for span, weights in self._copies(parameter):
                zero_removed(weights, PackedKeep(self.masks.packed(name), *span, weights.device).unpacked())
            if name in self._keep:
                keep = self._keep[name].unpacked()
                for value in (self._master(parameter), *self._moments(parameter)):
                    assert value is not None
                    zero_removed(value, keep)

    def _moments(self, parameter: Tensor) -> Iterator[Tensor]:
        """Every optimizer state of the owner's own shape: momentum, Adam's moments."""
        owner = self._owner(parameter)
        assert owner is not None
        for optimizer in self._optimizers:
            for value in optimizer.state.get(owner, {}).values():
                if isinstance(value, Tensor) and value.shape == owner.shape and value.is_floating_point():
                    yield self._piece(parameter, value)

    def violations(self) -> dict[str, int]:
        """
        How many pruned weights are not zero, in the masters or in the copies in use; {} when the masks hold.

        A collective of the ranks, which all get the same counts.
        """
        counts = {}
        for name, parameter in self._parameters().items():
            (start, stop), own = self._own(parameter)
            copies = [copy.flatten()[start - at.start : stop - at.start] for at, copy in self._copies(parameter)]
            keep = self.own_keep(name)
            # Masters may be offloaded to the CPU, and the copies be on the device.
            counts[name] = max(count_removed(values, keep.to(values.device)) for values in (own.flatten(), *copies))
        return {name: count for name, count in self._summed(counts).items() if count}

    def _summed(self, counts: dict[str, int]) -> dict[str, int]:
        total = self.ranks.sum(torch.tensor(list(counts.values()), dtype=torch.int64, device=self._device))
        return dict(zip(counts, total.tolist(), strict=True))

    def layer_sparsity(self) -> dict[str, float]:
        """The fraction of zeros in every masked parameter, counted in the weights; a collective of the ranks."""
        nonzero = {name: int(own.count_nonzero()) for name in self.masks for own in [self.own(name)]}
        sizes = {name: torch.Size(self.masks.shape(name)).numel() for name in self.masks}
        return {name: 1 - count / max(1, sizes[name]) for name, count in self._summed(nonzero).items()}

    def own(self, name: str) -> Float[Tensor, " own"]:
        """
        The master weights of a masked parameter that this rank alone speaks for: over the ranks, each weight once.

        In increasing order of the ranks they make up the flattened parameter.
        """
        span, weights = self._own(self._parameter(name))
        assert weights.numel() == span.size
        return weights.flatten()

    def own_keep(self, name: str) -> Bool[Tensor, " own"]:
        """The keep mask of what `own` returns."""
        span, weights = self._own(self._parameter(name))
        return PackedKeep(self.masks.packed(name), *span, weights.device).unpacked()

    def _own(self, parameter: Tensor) -> tuple[Span, Tensor]:
        if not self._counts(parameter):
            return Span(0, 0), torch.empty(0, device=self._device)
        master = self._master(parameter)
        return next(self._copies(parameter)) if master is None else (self._span(parameter), master)

    def joined(self, own: Iterable[tuple[str, Bool[Tensor, " own"]]]) -> MaskSet:
        """The masks of which every rank gives its own places, in the order of `own`; a collective, layer by layer."""
        return MaskSet.join(MaskSet({name: self._whole(self._parameter(name), k).bool()}) for name, k in own)

    def read(self, name: str) -> Tensor:
        """A whole master weight, in its own shape and dtype, a copy on its device; a collective of the ranks."""
        parameter = self._parameter(name)
        return self._whole(parameter, self._own(parameter)[1].flatten())

    def _whole(self, parameter: Tensor, own: Tensor) -> Tensor:
        shape = whole_shape(parameter)
        dtype = torch.uint8 if own.dtype == torch.bool else own.dtype
        flat = torch.zeros(shape.numel(), dtype=dtype, device=self._device)
        span = self._own(parameter)[0]
        flat[span.start : span.stop] = own.to(flat)
        return self.ranks.sum(flat).view(shape)  # the others' places are zeros: the sum is exact

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Overwrites a whole weight, in its master copy and the copies in use; every rank passes the same."""
        parameter = self._parameter(name)
        flat = value.detach().flatten()
        master = self._master(parameter)
        targets = list(self._copies(parameter)) + ([] if master is None else [(self._span(parameter), master)])
        for (start, stop), weights in targets:
            weights.copy_(flat[start:stop].view(weights.shape))
