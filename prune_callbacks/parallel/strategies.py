"""Which access serves which of Lightning's strategies."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prune_callbacks.parallel.access import ParamAccess
from prune_callbacks.parallel.plain import PlainAccess
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.sparsity import MaskSet

SERVED = 'one device or strategy="ddp", ModelParallelStrategy (FSDP2), or DeepSpeedStrategy(stage=1, 2 or 3)'


def refuse_unserved(strategy: Strategy) -> None:
    """Raises ValueError for a strategy under which masks cannot be held."""
    problem = None
    if isinstance(strategy, DeepSpeedStrategy):
        problem = _zero_problem(strategy)
    elif isinstance(strategy, ModelParallelStrategy):
        if strategy._tensor_parallel_size not in ("auto", 1) or (
            strategy._tensor_parallel_size == "auto" and strategy.num_processes > 1
        ):
            problem = (
                "with tensor parallelism, which cuts weights across; use ModelParallelStrategy(data_parallel_size=the "
                "number of processes, tensor_parallel_size=1)"
            )
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        problem = f"whose parameters it does not know how to reach; use {SERVED}"
    if problem is not None:
        raise ValueError(f"prune_callbacks cannot hold masks under {type(strategy).__name__} {problem}")


def _zero_problem(strategy: DeepSpeedStrategy) -> str | None:
    config: dict[str, Any] = strategy.config or {}
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2, 3):
        return f'with ZeRO stage {zero.get("stage", 0)}; use stage 1, 2 or 3, or strategy="ddp" in place of stage 0'
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            return f"with {part} on NVMe, where masters and moments are files; offload to the CPU instead"
    offload = zero.get("offload_optimizer") or {}
    if zero.get("zenflow") or offload.get("super_offload") or offload.get("ratio", 1) < 1:
        return (
            "with ZenFlow, SuperOffload or a partly offloaded optimizer, which have steps of their own; leave that out"
        )
    if (config.get("data_types") or {}).get("grad_accum_dtype"):
        return "with a dtype of its own for accumulating gradients (data_types), another optimizer; leave that out"
    if zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("mics_shard_size", -1) > 0:
        return "with a second partition of the weights (zero_hpz_partition_size, mics_shard_size); leave that out"
    return None


def world(trainer: Trainer) -> Ranks:
    """All processes of a trainer's fit."""
    return Ranks(dist.group.WORLD, trainer.strategy.root_device) if trainer.world_size > 1 else ALONE


def param_access(trainer: Trainer, masks: MaskSet) -> ParamAccess:
    """
    The access to the masked parameters of a trainer's module, in a fit, once its strategy has been set up.

    Raises:
        ValueError: the masks do not fit the module, or its strategy is not served.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    refuse_unserved(strategy)
    ranks = world(trainer)
    if isinstance(strategy, DeepSpeedStrategy):
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        from prune_callbacks.parallel.zero import Zero3Access, Zero12Access

        engine = strategy.deepspeed_engine
        if type(engine.optimizer) is DeepSpeedZeroOptimizer:
            return Zero12Access(module, masks, engine, ranks)
        if type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3:
            return Zero3Access(module, masks, engine, ranks)
        raise ValueError(
            f"prune_callbacks cannot hold masks under DeepSpeed's {type(engine.optimizer).__name__}; use its ZeRO "
            "optimizers with their default dtype of gradient accumulation"
        )
    if isinstance(strategy, ModelParallelStrategy):
        from prune_callbacks.parallel.fsdp2 import FSDP2Access

        return FSDP2Access(module, masks, trainer.optimizers, ranks)
    return PlainAccess(module, masks, trainer.optimizers, ranks)


def sharded(strategy: Strategy) -> bool:
    """Whether no rank has all weights, masters and moments."""
    return isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy)


def refuse_sharded(strategy: Strategy, who: str) -> None:
    """Raises ValueError, in the name of `who`, for a strategy that shards parameters."""
    if sharded(strategy):
        raise ValueError(f'{who} does not work under {type(strategy).__name__}; use one device or strategy="ddp"')


def lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed because another process has ended."""
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error) and "onnection" in str(error)
    )


def gathered_state_dict(trainer: Trainer, model: nn.Module) -> dict[str, Tensor] | None:
    """
    The `state_dict` of a part of the trainer's module, whole and on the CPU, on rank 0; of the others None.

    A collective: parameters that are sharded are gathered one after another.
    """
    if not sharded(trainer.strategy):
        return model.state_dict() if trainer.is_global_zero else None
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}  # what is tied stays one tensor
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in copies:
            whole = _gathered(value)
            copies[id(value)] = whole.detach().to("cpu", copy=True) if trainer.is_global_zero else torch.empty(0)
        state[name] = copies[id(value)]
    return state if trainer.is_global_zero else None


def _gathered(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone() if dist.get_rank() == 0 else tensor.detach()[:0]
    return tensor


def masks_of_zeros(trainer: Trainer, weights: Mapping[str, Tensor]) -> MaskSet:
    """`MaskSet.from_nonzero` of these parameters, in a fit, wherever the strategy has put them."""
    shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in weights.items()}
    access = param_access(trainer, MaskSet.all_kept(shapes))
    return access.joined((name, access.own(name) != 0) for name in shapes)


def stepping_optimizers(trainer: Trainer) -> list[Any]:
    """The optimizers that make the steps: the one of torch inside ZeRO's, or the trainer's own."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return [cast(Any, optimizer).optimizer for optimizer in trainer.optimizers]
    return list(trainer.optimizers)
