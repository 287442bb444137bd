"""A single device, or DDP: every rank holds whole parameters, which are also the master copies."""

from torch import Tensor

from prune_callbacks.parallel.access import ParamAccess, Span


class PlainAccess(ParamAccess):
    """`ParamAccess` for parameters that every rank holds completely; only rank 0 contributes to collectives."""

    def _span(self, parameter: Tensor) -> Span:
        return Span(0, parameter.numel())

    def _owner(self, parameter: Tensor) -> Tensor:
        return parameter

    def _piece(self, parameter: Tensor, whole: Tensor) -> Tensor:
        return whole.detach()

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        return parameter.grad

    def _counts(self, parameter: Tensor) -> bool:
        return self.ranks.rank == 0
