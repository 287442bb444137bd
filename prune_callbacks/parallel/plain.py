"""One device, or DDP: every rank holds whole parameters, and the parameter is its own master copy."""

from torch import Tensor

from prune_callbacks.parallel.access import ParamAccess, Span


class PlainAccess(ParamAccess):
    """See `ParamAccess`. Rank 0 speaks for all, since all hold the same."""

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
