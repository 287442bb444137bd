"""One device, or DDP: every rank holds whole parameters, and the parameter is its own master copy."""

from collections.abc import Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_callbacks.sparsity import MaskSet

T = TypeVar("T")


class PlainAccess:
    """
    Holds masks on the gradients, weights and optimizer state of a module.

    Parameters are looked up by name at every call, so that a module whose parameters were replaced (cast,
    moved, re-wrapped) is served as well. `masked_fill_` rather than a product: it removes inf and NaN too,
    and leaves +0.0.
    """

    def __init__(self, module: nn.Module, masks: MaskSet) -> None:
        self._module = module
        self._masks = masks
        # One byte per weight on the parameter's device while training; the MaskSet itself stays packed.
        self._pruned = {name: ~masks[name].to(p.device) for name, p in self._parameters().items()}

    def _parameters(self) -> dict[str, Tensor]:
        return self._masks.matching(self._module.named_parameters())

    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights, so that they enter neither the clipping norm nor the moments."""
        for name, parameter in self._parameters().items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._pruned[name], 0)

    @torch.no_grad()
    def project(self) -> None:
        """Zeroes the pruned weights."""
        for name, parameter in self._parameters().items():
            parameter.masked_fill_(self._pruned[name], 0)

    def zero_moments(self, optimizers: Iterable[Optimizer]) -> None:
        """Zeroes every optimizer state of a parameter's own shape (momentum, Adam's moments) at pruned places."""
        parameters = self._parameters()
        for optimizer in optimizers:
            for name, parameter in parameters.items():
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.masked_fill_(self._pruned[name], 0)

    def violations(self) -> int:
        """How many pruned weights are not zero."""
        return sum(self._masks.violations(self._module.named_parameters()).values())


def refuse_unserved(strategy: Strategy) -> None:
    """Raises ValueError for a strategy under which masks cannot be held."""
    plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not plain:
        raise ValueError(
            f"prune_callbacks cannot hold masks under {type(strategy).__name__}, which shards parameters or keeps "
            'master copies elsewhere; use one device or strategy="ddp"'
        )


def from_rank_zero(value: T, module: nn.Module) -> T:
    """
    Rank 0's `value`, with rank 0's parameters copied into `module`, on every rank.

    The other ranks wait for as long as it takes: pruning may outlast the timeout of the default process group
    (half an hour), which would end the job. Parameters must be on the CPU.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    for parameter in module.parameters():
        dist.broadcast(parameter.data, src=0, group=group)
    dist.destroy_process_group(group)
    return values[0]


def param_access(strategy: Strategy, module: nn.Module, masks: MaskSet) -> PlainAccess:
    """The access for a strategy."""
    refuse_unserved(strategy)
    return PlainAccess(module, masks)
