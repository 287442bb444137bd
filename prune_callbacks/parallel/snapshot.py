"""Saves weights, optimizer state and scheduler state to a file during a fit, and restores them."""

import pickle
import uuid
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from prune_callbacks.parallel.fsdp2 import local
from prune_callbacks.parallel.strategies import sharded, stepping_optimizers, world
from prune_callbacks.writing import whole_file

State = dict[str, Any]


def save_snapshot(trainer: Trainer, path: Path) -> str:
    """
    Writes the module's weights and the state of optimizers and learning-rate schedulers; returns the snapshot's name.

    If parameters are sharded, `path` is a folder and every rank writes its own shards into it. Otherwise rank 0 writes
    one file. Files are written atomically. A collective of the ranks.

    Raises:
        ValueError: on every rank, if the state holds objects that `torch.load(weights_only=True)` refuses, or the
            files cannot be read back on one rank.
    """
    state, ranks = _state(trainer), world(trainer)
    state["snapshot"] = name = ranks.share(uuid.uuid4().hex)
    state["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    file = _file(trainer, path)

    def write() -> None:
        if trainer.is_global_zero or sharded(trainer.strategy):
            with whole_file(file) as partial:
                torch.save(state, partial)
                try:
                    # Fails now instead of at the first rewind, rounds later.
                    torch.load(partial, mmap=True, map_location="cpu", weights_only=True)
                except pickle.UnpicklingError as error:
                    raise ValueError(
                        "the state of an optimizer or learning-rate scheduler holds objects that cannot be read back "
                        f"safely: {error}"
                    ) from error

    ranks.attempt(write)
    check_snapshot(trainer, path, name)  # fails now, instead of rounds later, if a process cannot see the files
    return name


def check_snapshot(trainer: Trainer, path: Path, name: str) -> None:
    """Raises ValueError, on every rank, for a `path` without a snapshot, or with one of another name."""

    def check() -> None:
        file = _file(trainer, path)
        others = sorted(path.glob("rank_*_of_*.pt")) if path.is_dir() else []
        if not file.is_file() and others:
            raise ValueError(
                f"the rewind files in {path} were written by {others[0].stem.rpartition('_')[2]} processes, and now "
                f"there are {trainer.world_size}; resume with the same number of processes"
            )
        if not file.is_file():
            raise ValueError(
                f"there is no rewind file at {file}. Put it back, or name its folder with Rewind(dirpath=)"
            )
        try:
            found = torch.load(file, mmap=True, map_location="cpu", weights_only=True).get("snapshot")
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            found = None
        if found != name:
            raise ValueError(
                f"{file} is not the rewind file that this training wrote: another run has written over it. Give every "
                "run a folder of its own with Rewind(dirpath=)"
            )

    world(trainer).attempt(check)


def load_snapshot(trainer: Trainer, path: Path, name: str, *, optimizer: bool) -> None:
    """
    Restores the weights that `save_snapshot` wrote, in the module and in the optimizers' master copies.

    Args:
        trainer: the trainer of the fit that wrote the snapshot, or of a fit resumed from it on as many ranks.
        path: the path of the snapshot.
        name: the name that `save_snapshot` returned.
        optimizer: whether to restore the state of optimizers and schedulers too.

    Raises:
        ValueError: the snapshot is missing, or has another name.
    """
    check_snapshot(trainer, path, name)
    state = torch.load(_file(trainer, path), map_location="cpu", weights_only=True, mmap=sharded(trainer.strategy))
    if sharded(trainer.strategy):
        _load_shards(trainer, state, optimizer)
    else:
        trainer.strategy.load_model_state_dict(state, strict=True)
        if optimizer:
            trainer.strategy.load_optimizer_state_dict(state)
    if optimizer:
        for config, scheduler in zip(trainer.lr_scheduler_configs, state["lr_schedulers"], strict=True):
            config.scheduler.load_state_dict(scheduler)


def _file(trainer: Trainer, path: Path) -> Path:
    if not sharded(trainer.strategy):
        return path.with_suffix(".pt")
    return path / f"rank_{trainer.global_rank}_of_{trainer.world_size}.pt"


def _state(trainer: Trainer) -> State:
    strategy = trainer.strategy
    if not sharded(trainer.strategy):
        return {
            "state_dict": strategy.lightning_module_state_dict(),
            "optimizer_states": [strategy.optimizer_state(optimizer) for optimizer in strategy.optimizers],
        }
    # Without communication. DeepSpeed's own checkpoints are unsuitable: only a freshly built engine can load them.
    return {
        "masters": [_on_cpu(master) for master in _masters(trainer)],
        "moments": [
            {key: _on_cpu(value) if isinstance(value, Tensor) else value for key, value in moments.items()}
            for moments in _moments(trainer)
        ],
        "groups": [_settings(group) for optimizer in stepping_optimizers(trainer) for group in optimizer.param_groups],
        "buffers": {name: _on_cpu(buffer) for name, buffer in trainer.lightning_module.named_buffers()},
    }


@torch.no_grad()
def _load_shards(trainer: Trainer, state: State, optimizer: bool) -> None:
    for master, saved in zip(_masters(trainer), state["masters"], strict=True):
        local(master).copy_(saved)
    for name, buffer in trainer.lightning_module.named_buffers():
        buffer.copy_(state["buffers"][name])
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        _update_weights_in_use(trainer.strategy.deepspeed_engine.optimizer)
    if not optimizer:
        return
    groups = [group for optimizer in stepping_optimizers(trainer) for group in optimizer.param_groups]
    for group, settings in zip(groups, state["groups"], strict=True):
        group.update(settings)
    for moments, saved in zip(_moments(trainer), state["moments"], strict=True):
        for key in [key for key in moments if key not in saved]:  # a snapshot before the first step has no moments
            del moments[key]
        for key, value in saved.items():
            if isinstance(value, Tensor):
                local(moments[key]).copy_(value)  # in place, because DeepSpeed holds views of it
            else:
                moments[key] = value


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _masters(trainer: Trainer) -> list[Tensor]:
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        zero = trainer.strategy.deepspeed_engine.optimizer
        flat = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
        return cast(list[Tensor], flat)
    return [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]


def _moments(trainer: Trainer) -> list[dict[str, Any]]:
    states = [optimizer.state for optimizer in stepping_optimizers(trainer)]
    return [next((state[m] for state in states if m in state), {}) for m in _masters(trainer)]


def _on_cpu(tensor: Tensor) -> Tensor:
    return local(tensor).to("cpu", copy=True)


def _update_weights_in_use(zero: Any) -> None:
    """Updates ZeRO's weights in forward passes from its master copies, as after a step."""
    if hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False  # the links point to moments that have been replaced
        return
    for group in zero.fp16_groups:
        for parameter in group:
            place, start, count = zero.grad_position[zero.get_param_id(parameter)]
            master = zero.fp32_partitioned_groups_flat[place].narrow(0, start, count)
            parameter.ds_tensor.view(-1).copy_(master)
    if zero.persistent_parameters:  # small parameters that stay unsharded on every rank
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
