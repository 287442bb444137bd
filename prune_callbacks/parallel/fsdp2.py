"""FSDP2 (`ModelParallelStrategy`): a rank holds rows of every parameter in a DTensor, which is also the master copy."""

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from prune_callbacks.parallel.access import ParamAccess, Span


class FSDP2Access(ParamAccess):
    """`ParamAccess` for parameters sharded by rows over one mesh dimension and replicated over the others."""

    def _span(self, parameter: Tensor) -> Span:
        return span_of(parameter)

    def _prepare(self) -> None:
        for module in self._module.modules():
            if isinstance(module, FSDPModule):  # it may still be unsharded after a forward pass of evaluation
                module.reshard()

    def _owner(self, parameter: Tensor) -> Tensor:
        return parameter

    def _piece(self, parameter: Tensor, whole: Tensor) -> Tensor:
        return local(whole)

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        return None if parameter.grad is None else local(parameter.grad)

    def _counts(self, parameter: Tensor) -> bool:
        if not isinstance(parameter, DTensor):
            return self.ranks.rank == 0
        coordinate = parameter.device_mesh.get_coordinate()
        assert coordinate is not None
        return all(c == 0 for c, p in zip(coordinate, parameter.placements, strict=True) if isinstance(p, Replicate))


def local(tensor: Tensor) -> Tensor:
    """Returns a detached view of this rank's shard of a DTensor; of any other tensor, a view of it all."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def span_of(parameter: Tensor) -> Span:
    """Returns the indices that this rank holds of a parameter; raises ValueError unless it is sharded by rows."""
    if not isinstance(parameter, DTensor):
        return Span(0, parameter.numel())
    sharded = [placement for placement in parameter.placements if not isinstance(placement, Replicate)]
    if len(sharded) > 1 or any(type(placement) is not Shard or placement.dim != 0 for placement in sharded):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is placed as {parameter.placements}; masks need "
            "parameters sharded by rows over one mesh dimension, as fully_shard(module, mesh=...) does by default"
        )
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    row = parameter.shape[1:].numel()
    start = offset[0] * row if shape[0] else 0
    return Span(start, start + shape[0] * row)
