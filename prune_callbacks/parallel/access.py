"""ParamAccess: applies masks to one rank's part of a module's parameters, under any training strategy."""

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
    """The indices `start` to `stop` (exclusive) of a flattened parameter: the part whose master copy a rank holds."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Returns the number of indices."""
        return self.stop - self.start


def parameter_places(masks: MaskSet, module: nn.Module) -> dict[str, str]:
    """Returns the name of every mask's parameter in a module, partitioned or not; raises ValueError as `matching`."""
    named = dict(module.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    return masks.places({name: whole_shape(parameter) for name, parameter in named.items()}, trained)


class ParamAccess(ABC):
    """
    Access to the masked parameters of a module: weights, gradients, optimizer moments, optimizer master copies.

    Each rank masks its span of every parameter by the same span of the mask, stored at one bit per weight. Only methods
    documented as collectives communicate. Parameters are looked up by name at every call, so that they may be replaced
    (cast, moved, wrapped again) in between.

    A subclass serves a family of strategies. It must define `_span`, `_owner`, `_piece`, `_gradient`. It may override
    `_copies` (default: none), `_counts` (default: every rank counts) and `_prepare` (default: does nothing). If several
    ranks hold the same span, as under DDP, `_counts` must be True on one of them only.

    Example: under ZeRO-1, two ranks train a parameter of 12 weights. Rank 1 holds the masters of the last 6, at indices
    20 to 26 of its flat fp32 tensor. Then rank 1 returns

    - `_span`: `Span(6, 12)`, indices of the flattened parameter
    - `_owner`: the flat fp32 tensor, which is in the optimizer's groups and has moments of its shape
    - `_piece(parameter, whole)`: `whole[20:26]`, a view; of the owner it is the master, of a moment the moments
    - `_copies`: `(Span(0, 12), parameter)`, the bf16 weights of forward passes, which are whole on both ranks

    Args:
        module: the module with the parameters, whose names must fit `masks` (see `MaskSet.places`).
        masks: the masks to hold.
        optimizers: the torch optimizers that make the steps.
        ranks: the processes that each parameter is sharded or replicated over.

    Raises:
        ValueError: the masks do not fit the module.
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
        self._places = parameter_places(self.masks, self._module)
        self._strays: dict[int, bool] = {}  # by optimizer; see `after_step`
        self._keep = {}
        for name, parameter in self._parameters().items():
            weights = self._master(parameter)
            if weights is not None:
                self._keep[name] = PackedKeep(masks.packed(name), *self._span(parameter), weights.device)

    @abstractmethod
    def _span(self, parameter: Tensor) -> Span:
        """Returns the indices whose master copy this rank holds."""

    @abstractmethod
    def _owner(self, parameter: Tensor) -> Tensor | None:
        """Returns the tensor in the optimizer's groups that holds the span; None if this rank holds no master of it."""

    @abstractmethod
    def _piece(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """Returns a view of the span in `whole`, the owner or one of its moments."""

    @abstractmethod
    def _gradient(self, parameter: Tensor) -> Tensor | None:
        """Returns a view of the span's gradient, fully accumulated and not yet clipped; None without a gradient."""

    def _copies(self, parameter: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """Yields (span, view) of the weights that forward passes use, where they are not the master."""
        return iter(())

    def _counts(self, parameter: Tensor) -> bool:
        """Returns whether this rank adds its span to collectives; True on one of the ranks that hold the same span."""
        return True

    def _prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Prepares the module; runs before every lookup of parameters."""

    def _parameter(self, name: str) -> Tensor:
        try:
            return self._module.get_parameter(self._places[name])
        except AttributeError:  # the layer has been wrapped (by an adapter) or unwrapped since
            self._places = parameter_places(self.masks, self._module)
            return self._module.get_parameter(self._places[name])

    def _parameters(self) -> dict[str, Tensor]:
        self._prepare()
        return {name: self._parameter(name) for name in self.masks}

    def _master(self, parameter: Tensor) -> Tensor | None:
        owner = self._owner(parameter)
        return None if owner is None else self._piece(parameter, owner)

    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights, which keeps them out of the clipping norm and the moments."""
        for name, parameter in self._parameters().items():
            if name in self._keep:
                gradient = self._gradient(parameter)
                if gradient is not None:
                    zero_removed(gradient, self._keep[name].unpacked())

    def after_step(self, optimizer: Optimizer) -> None:
        """
        Zeroes the pruned weights in the master copies that this optimizer updates, after its step.

        Moments of masked gradients stay zero by themselves, but some optimizers add to them: Adamax an epsilon, Rprop
        its step size. Whether one does is seen at its first step under these masks; if so, they are zeroed every time.
        """
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        strays, strayed = self._strays.get(id(optimizer), True), False
        for name, parameter in self._parameters().items():
            owner = self._owner(parameter)
            if owner is not None and id(owner) in stepped:
                keep = self._keep[name].unpacked()
                zero_removed(self._piece(parameter, owner), keep)
                for moment in self._moments(parameter) if strays else ():
                    strayed |= count_removed(moment, keep) > 0
                    zero_removed(moment, keep)
        self._strays[id(optimizer)] = strayed

    def project(self) -> None:
        """Zeroes the pruned weights in master copies and forward passes, and their optimizer moments."""
        for name, parameter in self._parameters().items():
            for span, weights in self._copies(parameter):
                zero_removed(weights, PackedKeep(self.masks.packed(name), *span, weights.device).unpacked())
            if name in self._keep:
                keep = self._keep[name].unpacked()
                for value in (self._master(parameter), *self._moments(parameter)):
                    assert value is not None
                    zero_removed(value, keep)

    def _moments(self, parameter: Tensor) -> Iterator[Tensor]:
        """Yields every optimizer state of the owner's shape: momentum, Adam's moments."""
        owner = self._owner(parameter)
        assert owner is not None
        for optimizer in self._optimizers:
            for value in optimizer.state.get(owner, {}).values():
                if isinstance(value, Tensor) and value.shape == owner.shape and value.is_floating_point():
                    yield self._piece(parameter, value)

    def violations(self) -> dict[str, int]:
        """
        Counts the pruned weights that are not zero, by parameter; {} if there are none.

        Counts in the master copies and in the weights of forward passes, and takes the larger number. A collective of
        the ranks; all get the same counts.
        """
        counts = {}
        for name, parameter in self._parameters().items():
            (start, stop), own = self._own(parameter)
            copies = [copy.flatten()[start - at.start : stop - at.start] for at, copy in self._copies(parameter)]
            keep = self.own_keep(name)
            # Masters may be offloaded to the CPU while the copies are on the device.
            counts[name] = max(count_removed(values, keep.to(values.device)) for values in (own.flatten(), *copies))
        return {name: count for name, count in self._summed(counts).items() if count}

    def _summed(self, counts: dict[str, int]) -> dict[str, int]:
        total = self.ranks.sum(torch.tensor(list(counts.values()), dtype=torch.int64, device=self._device))
        return dict(zip(counts, total.tolist(), strict=True))

    def layer_sparsity(self) -> dict[str, float]:
        """Returns the fraction of zeros among the weights of every masked parameter; a collective of the ranks."""
        nonzero = {name: int(own.count_nonzero()) for name in self.masks for own in [self.own(name)]}
        sizes = {name: torch.Size(self.masks.shape(name)).numel() for name in self.masks}
        return {name: 1 - count / max(1, sizes[name]) for name, count in self._summed(nonzero).items()}

    def own(self, name: str) -> Float[Tensor, " own"]:
        """
        Returns this rank's part of the master weights of a masked parameter, flattened; each weight is on one rank.

        Concatenated in the order of the ranks, the parts are the flattened parameter.
        """
        span, weights = self._own(self._parameter(name))
        assert weights.numel() == span.size
        return weights.flatten()

    def own_keep(self, name: str) -> Bool[Tensor, " own"]:
        """Returns the keep mask of the weights that `own` returns."""
        span, weights = self._own(self._parameter(name))
        return PackedKeep(self.masks.packed(name), *span, weights.device).unpacked()

    def _own(self, parameter: Tensor) -> tuple[Span, Tensor]:
        if not self._counts(parameter):
            return Span(0, 0), torch.empty(0, device=self._device)
        master = self._master(parameter)
        return next(self._copies(parameter)) if master is None else (self._span(parameter), master)

    def joined(self, own: Iterable[tuple[str, Bool[Tensor, " own"]]]) -> MaskSet:
        """Assembles whole masks from the ranks' parts, in the order of `own`; a collective for every layer."""
        return MaskSet.join(MaskSet({name: self._whole(self._parameter(name), k).bool()}) for name, k in own)

    def read(self, name: str) -> Tensor:
        """Returns a copy of a whole master weight, in the parameter's shape; a collective of the ranks."""
        parameter = self._parameter(name)
        return self._whole(parameter, self._own(parameter)[1].flatten())

    def _whole(self, parameter: Tensor, own: Tensor) -> Tensor:
        shape = whole_shape(parameter)
        dtype = torch.uint8 if own.dtype == torch.bool else own.dtype
        flat = torch.zeros(shape.numel(), dtype=dtype, device=self._device)
        span = self._own(parameter)[0]
        flat[span.start : span.stop] = own.to(flat)
        return self.ranks.sum(flat).view(shape)  # exact, because every index is nonzero on one rank at most

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Overwrites a whole weight, in its master copy and in forward passes; every rank passes the same `value`."""
        parameter = self._parameter(name)
        flat = value.detach().flatten()
        master = self._master(parameter)
        targets = list(self._copies(parameter)) + ([] if master is None else [(self._span(parameter), master)])
        for (start, stop), weights in targets:
            weights.copy_(flat[start:stop].view(weights.shape))
