"""Maps Lightning's strategies to the `ParamAccess` that serves them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from prune_callbacks.parallel.shapes import whole_shape
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.sparsity import MaskSet


@dataclass(frozen=True)
class Served:
    """
    A strategy, and how masks are held under it; see `register_strategy`.

    Attributes:
        strategy: the strategy's class; applies to its subclasses too.
        access: makes the `ParamAccess` from the trainer, the module with the parameters, the masks and the ranks. It is
            called after the strategy has been set up.
        problem: given a strategy, returns why its settings are not supported, as a clause that ends with a remedy; None
            if they are.
        sharded: whether weights, masters or moments are sharded, so that no rank has all of them.
    """

    strategy: type[Strategy]
    access: Callable[[Trainer, nn.Module, MaskSet, Ranks], ParamAccess]
    problem: Callable[[Any], str | None] = lambda strategy: None
    sharded: bool = False


def _plain_access(trainer: Trainer, module: nn.Module, masks: MaskSet, ranks: Ranks) -> ParamAccess:
    return PlainAccess(module, masks, trainer.optimizers, ranks)


def _fsdp2_access(trainer: Trainer, module: nn.Module, masks: MaskSet, ranks: Ranks) -> ParamAccess:
    from prune_callbacks.parallel.fsdp2 import FSDP2Access

    return FSDP2Access(module, masks, trainer.optimizers, ranks)


def _zero_access(trainer: Trainer, module: nn.Module, masks: MaskSet, ranks: Ranks) -> ParamAccess:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from prune_callbacks.parallel.zero import Zero3Access, Zero12Access

    engine = cast(DeepSpeedStrategy, trainer.strategy).deepspeed_engine
    if type(engine.optimizer) is DeepSpeedZeroOptimizer:
        return Zero12Access(module, masks, engine, ranks)
    if type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return Zero3Access(module, masks, engine, ranks)
    raise ValueError(
        f"prune_callbacks cannot hold masks under DeepSpeed's {type(engine.optimizer).__name__}; use its ZeRO "
        "optimizers with the default gradient accumulation dtype"
    )


def _fsdp2_problem(strategy: ModelParallelStrategy) -> str | None:
    parallel = strategy._tensor_parallel_size
    if parallel == 1 or (parallel == "auto" and strategy.num_processes == 1):
        return None
    return (
        "with tensor parallelism, which shards weights in other ways; use ModelParallelStrategy(data_parallel_size="
        "the number of processes, tensor_parallel_size=1)"
    )


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
            "with ZenFlow, SuperOffload or a partly offloaded optimizer, which step outside ZeRO's optimizer; leave "
            "that out"
        )
    if (config.get("data_types") or {}).get("grad_accum_dtype"):
        return "with a gradient accumulation dtype (data_types), which selects another optimizer; leave that out"
    if zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("mics_shard_size", -1) > 0:
        return "with a second partition of the weights (zero_hpz_partition_size, mics_shard_size); leave that out"
    return None


_SERVED: list[Served] = [
    Served(SingleDeviceStrategy, _plain_access),
    Served(DDPStrategy, _plain_access),
    Served(ModelParallelStrategy, _fsdp2_access, _fsdp2_problem, sharded=True),
    Served(DeepSpeedStrategy, _zero_access, _zero_problem, sharded=True),
]


def register_strategy(served: Served) -> None:
    """
    Registers how masks are held under a strategy; takes precedence over earlier registrations and the built-in ones.

    Call it before `Trainer.fit`, in every process. `prune_callbacks.extend` lists the features that do not
    support registered strategies.

    Raises:
        ValueError: `served` is not a `Served`.
    """
    if not isinstance(served, Served):
        raise ValueError(f"register_strategy takes Served(strategy=..., access=...), got {served!r}")
    _SERVED.append(served)


def _served(strategy: Strategy) -> Served | None:
    return next((served for served in reversed(_SERVED) if isinstance(strategy, served.strategy)), None)


def check_strategy(strategy: Strategy, who: str, *, whole_weights: bool) -> None:
    """
    Raises ValueError for a strategy that does not support a callback; no other function refuses strategies.

    FSDP1 (`FSDPStrategy`), which flattens parameters, is served by no entry and so refused.

    Args:
        strategy: the trainer's strategy.
        who: class name of the callback.
        whole_weights: whether the callback needs all weights on every process; if not, it needs masks to be supported.
    """
    name, served = type(strategy).__name__, _served(strategy)
    if whole_weights:
        if served is None or served.sharded:
            raise ValueError(f'{who} does not work under {name}; use one device or strategy="ddp"')
        return
    problem = (
        'whose parameters it cannot access; use one device or strategy="ddp", ModelParallelStrategy '
        "(FSDP2), or DeepSpeedStrategy(stage=1, 2 or 3)"
        if served is None
        else served.problem(strategy)
    )
    if problem is not None:
        raise ValueError(f"prune_callbacks cannot hold masks under {name} {problem}")


def world(trainer: Trainer) -> Ranks:
    """Returns the `Ranks` of all processes of a trainer's fit."""
    return Ranks(dist.group.WORLD, trainer.strategy.root_device) if trainer.world_size > 1 else ALONE


def param_access(trainer: Trainer, masks: MaskSet, module: nn.Module) -> ParamAccess:
    """
    Makes the access to masked parameters in a fit; call it after the strategy has been set up.

    Args:
        trainer: a trainer whose strategy `check_strategy` has accepted.
        masks: the masks.
        module: the module with their parameters: the trainer's module, or a part of it.

    Raises:
        ValueError: the masks do not fit the module.
    """
    served = _served(trainer.strategy)
    assert served is not None
    return served.access(trainer, module, masks, world(trainer))


def sharded(strategy: Strategy) -> bool:
    """Returns whether a strategy shards weights, masters or moments, so that no rank has all of them."""
    served = _served(strategy)
    return served is not None and served.sharded


def lost_a_process(error: BaseException) -> bool:
    """Returns whether an error means that a collective failed because another process has ended."""
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error) and "onnection" in str(error)
    )


def gathered_state_dict(trainer: Trainer, model: nn.Module) -> dict[str, Tensor] | None:
    """
    Returns the unsharded `state_dict` of a part of the trainer's module on rank 0, None on the others.

    A collective; see `gathered`.
    """
    if not sharded(trainer.strategy):
        return model.state_dict() if trainer.is_global_zero else None
    return gathered(trainer, model.state_dict(keep_vars=True))


def gathered(trainer: Trainer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """
    Returns copies of tensors of the trainer's module, unsharded and on the CPU, on rank 0; None on the others.

    A collective. Parameters are gathered one after another; those under several names stay one tensor.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, value in tensors.items():
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


def masks_of_zeros(trainer: Trainer, weights: Mapping[str, Tensor], module: nn.Module) -> MaskSet:
    """Returns the masks of the nonzero `weights`, parameters of `module` by name, sharded or not; a collective."""
    shapes = {name: whole_shape(weight) for name, weight in weights.items()}
    access = param_access(trainer, MaskSet.all_kept(shapes), module)
    return access.joined((name, access.own(name) != 0) for name in shapes)


def stepping_optimizers(trainer: Trainer) -> list[Any]:
    """Returns the torch optimizers that make the steps: those inside ZeRO's optimizers, or the trainer's own."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return [cast(Any, optimizer).optimizer for optimizer in trainer.optimizers]
    return list(trainer.optimizers)
