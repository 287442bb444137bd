"""Run by tests as several processes: fits under a strategy, and what every rank saw in them."""

import os
import sys
from functools import partial
from pathlib import Path

import cpu_strategies
import families
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from prune_callbacks import (
    NM,
    OWL,
    CausalLM,
    Columns,
    IMPSchedule,
    IterativePrune,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    PermuteChannels,
    Rewind,
    SparseGPT,
    Structured,
    Unstructured,
    Wanda,
)
from prune_callbacks.parallel.strategies import param_access
from prune_callbacks.sparsity import keep_largest
from prune_callbacks.tasks import PythonDocs, TokenDataModule, byte_tokenizer, tiny_llama

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


class Module(CausalLM):
    """A Llama, and a layer of 35 weights: two ranks cannot halve it."""

    def __init__(self, seed=0, **optimizer):
        settings = {"lr": 1e-2, "weight_decay": 0.1} | optimizer
        super().__init__(tiny_llama(seed, hidden_size=32, layers=2), partial(torch.optim.AdamW, **settings))
        torch.manual_seed(seed)
        self.odd = nn.Linear(5, 7)

    def configure_model(self):
        super().configure_model()
        if self.device_mesh is not None:
            fully_shard(self.odd, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.odd(torch.ones(5, device=loss.device, dtype=self.odd.weight.dtype)) - 1).square().mean()


def masked_weights(module):
    return {name: p for name, p in module.named_parameters() if "proj" in name or name == "odd.weight"}


def half_masks(module, kept=0.5):
    """Of the random weights the larger half, layer by layer, before any strategy has them."""
    flat = {name: p.detach().abs().flatten() for name, p in masked_weights(module).items()}
    return MaskSet(
        {n: keep_largest(v, int(kept * len(v))).view(module.get_parameter(n).shape) for n, v in flat.items()}
    )


def whole(parameter, kind="weight"):
    """A whole weight, master, or moment, by the libraries' own ways and not ours; a collective."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == "weight":
            if not hasattr(parameter, "ds_id"):
                return parameter.detach().clone()
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        if kind == "master":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)
    return parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach().clone()


def moment(trainer, parameter, kind):
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return whole(parameter, kind)
    return whole(trainer.optimizers[0].state[parameter][kind])


class Spy(Callback):
    """After every optimizer step: the largest value at a pruned place of weights, masters and moments."""

    def __init__(self, holder):
        self.holder = holder  # a callback that has masks
        self.worst = []
        self.losses = []
        self.kept = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        masks = self.holder.masks or self.holder.given
        row = {"weight": 0.0, "master": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
        parameters = dict(pl_module.named_parameters())
        for name in masks:  # of the language model, or of the whole module
            parameter = parameters[name if name in parameters else f"model.{name}"]
            for kind in row if parameter.requires_grad else ["weight"]:
                value = moment(trainer, parameter, kind) if kind.startswith("exp") else whole(parameter, kind)
                row[kind] = max(row[kind], float((value * ~masks[name]).abs().max()))
        self.worst.append(row)
        self.kept.append({n: float(m.float().mean()) for n, m in masks.items()})


def data(rows=48, seed=5):
    return torch.randint(3, 200, (rows, 16), generator=torch.Generator().manual_seed(seed))


def world_size():
    """The processes that were started for this script."""
    return int(os.environ.get("WORLD_SIZE", 1))


def trainer_of(strategy, folder, callbacks, **settings):
    defaults = {
        "max_steps": 12,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "devices": 2,
    }
    return Trainer(strategy=strategy, callbacks=callbacks, default_root_dir=folder, **(defaults | settings))


def batches(rows=2):
    """The project's own loader, which goes on in the middle of an epoch."""
    nothing = PythonDocs("train")
    module = TokenDataModule(byte_tokenizer(), nothing, nothing, nothing, batch_size=rows)
    module.train_windows = module.evaluation_windows = data()
    return module


def weights_of(module):
    return {name: whole(p).float() for name, p in module.named_parameters()}


def saved(folder, name, trainer, **what):
    torch.save(what, Path(folder) / f"{name}_{trainer.global_rank}.pt")


def hold(folder, name, precision, steps):
    """So many optimizer steps with and without the enforcer."""
    devices = world_size()
    for enforced in (True, False):
        module = Module()
        masks = half_masks(module)
        masks.apply_(module.named_parameters())
        enforcer = MaskEnforcer(masks)
        spy = Spy(enforcer)
        callbacks = [enforcer, spy] if enforced else [spy]
        strategy = cpu_strategies.strategy_of(name, devices)
        settings = {"precision": precision, "max_epochs": 2, "max_steps": int(steps), "devices": devices}
        trainer = trainer_of(strategy, folder, callbacks, **settings)
        trainer.fit(module, datamodule=batches(4 // devices))
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        label = f"{name}_{precision}_{steps}_{'held' if enforced else 'free'}"
        saved(folder, label, trainer, worst=spy.worst, losses=spy.losses, logged=logged)


def experts(folder, name):
    """Three steps of a mixture whose experts and router are half zeros, which nothing but the zeros tells."""
    torch.manual_seed(0)
    config = families.MIXTURES["mixtral"]()
    config.vocab_size = 256
    module = CausalLM(AutoModelForCausalLM.from_config(config), partial(torch.optim.AdamW, lr=1e-2))
    zeros = {}
    with torch.no_grad():
        for place, parameter in module.named_parameters():
            if ".mlp." in place or "q_proj" in place:
                parameter.copy_(torch.randn_like(parameter) * 0.1 * (torch.rand_like(parameter) < 0.5))
                zeros[place] = parameter == 0
    enforcer = MaskEnforcer()
    spy = Spy(enforcer)
    strategy = cpu_strategies.strategy_of(name)
    settings = {"max_steps": 3, "accumulate_grad_batches": 1}
    trainer = trainer_of(strategy, folder, [enforcer, spy], **settings)
    trainer.fit(module, datamodule=batches())
    masks = {place: ~mask for place, mask in enforcer.masks.items()}
    saved(folder, name, trainer, worst=spy.worst, removed=masks, zeros=zeros)


CPU = {"device": "cpu", "pin_memory": False}
VARIANTS = {
    "zero1_offload": {"offload_optimizer": CPU},
    "zero2_offload": {"offload_optimizer": CPU},
    "zero3_offload": {"offload_optimizer": CPU, "offload_param": CPU},
    "zero3_persistent": {"stage3_param_persistence_threshold": 100_000},
    "zero2_frozen": {},
    "zero3_frozen": {},
    "zero3_subgroups": {"sub_group_size": 2000},
}
"""Other ways that DeepSpeed keeps things: in CPU memory, small weights whole, and with a frozen layer."""


def variant(folder, label):
    module = Module()
    masks = half_masks(module)
    masks.apply_(module.named_parameters())
    module.model.model.layers[0].mlp.requires_grad_("frozen" not in label)
    enforcer = MaskEnforcer(masks)
    spy = Spy(enforcer)
    strategy = cpu_strategies.strategy_of(label.split("_")[0])
    strategy.config["zero_optimization"] |= VARIANTS[label]
    trainer = trainer_of(strategy, folder, [enforcer, spy], max_epochs=2, max_steps=8)
    trainer.fit(module, datamodule=batches())
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    saved(folder, label, trainer, worst=spy.worst, losses=spy.losses, logged=logged)


class Write(Callback):
    """Writes whole weights through the access, and reads them back by it and by the libraries' own ways."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        masks = MaskSet.all_kept({n: m.shape for n, m in half_masks(Module()).items()})
        access = param_access(trainer, masks, pl_module)
        for name in ("odd.weight", "model.model.layers.1.mlp.down_proj.weight"):
            value = torch.randn(masks.shape(name), generator=torch.Generator().manual_seed(3))
            access.write(name, value)
            assert torch.equal(access.read(name), value)
            for kind in ("weight", "master"):
                assert torch.equal(whole(pl_module.get_parameter(name), kind), value)
        self.fractions = access.layer_sparsity()


def write(folder, name):
    write, module = Write(), Module()
    trainer = trainer_of(cpu_strategies.strategy_of(name), folder, [write], max_steps=1, accumulate_grad_batches=1)
    trainer.fit(module, datamodule=batches())
    saved(folder, name, trainer, fractions=write.fractions)


def iterate(folder, name, precision, rewind):
    """Two changes of the masks in the middle of a fit: going on, going back, or going back with the weights only."""
    where = Rewind(1, optimizer=rewind == "back", dirpath=Path(folder) / f"{name}_{rewind}_{precision}")
    prune = IterativePrune(IMPSchedule(0.75, rounds=2, every=4), rewind=None if rewind == "on" else where)
    module, enforcer, spy = Module(), MaskEnforcer(), Spy(prune)
    strategy = cpu_strategies.strategy_of(name)
    trainer = trainer_of(strategy, folder, [prune, enforcer, spy], precision=precision, max_epochs=2)
    trainer.fit(module, datamodule=batches())
    what = {"worst": spy.worst, "kept": spy.kept, "losses": spy.losses, "weights": weights_of(module)}
    saved(folder, f"{name}_{precision}_{rewind}", trainer, masks=dict(prune.masks), **what)


class Snapshot(Callback):
    """The weights before the first step."""

    def on_fit_start(self, trainer, pl_module):
        self.weights = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}


PRUNERS = {
    "sparsegpt": SparseGPT(Unstructured(0.5)),
    "wanda": Wanda(NM(2, 4)),
    "magnitude": Magnitude(NM(1, 4)),
    "structured": Structured(Columns(0.25)),
    "permuted": Wanda(NM(2, 4)),
    "owl": Wanda(Unstructured(0.5)),
}


def one_shot(folder, precision):
    """What two ranks make of the same calibration batches; run with one process it is what they are compared with."""
    devices = world_size()
    for label, pruner in PRUNERS.items():
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # every rank draws other training batches
        module = Module(seed=dist.get_rank() if dist.is_initialized() else 0)  # and another model: rank 0's counts
        if precision == "64-true":
            module.double()
        allocation = OWL(threshold=2.0, reach=0.05) if label == "owl" else None
        prune = OneShotPrune(pruner, data(12).split(4), allocation=allocation, progress=False)
        strategy = "ddp" if devices > 1 else "auto"
        before = Snapshot()
        first = [PermuteChannels(NM(2, 4), data(12).split(4), progress=False)] if label == "permuted" else []
        trainer = trainer_of(strategy, folder, [*first, prune, MaskEnforcer(), before], max_steps=1, devices=devices)
        trainer.fit(module, datamodule=batches())
        report = prune.report
        what = {
            "masks": dict(report.masks),
            "weights": before.weights,
            "layers": [layer.name for layer in report.layers],
        }
        saved(folder, f"{label}_{precision}_{devices}", trainer, **what)


def checkpoint(folder, name, rewind):
    """Rounds without interruption, keeping a checkpoint of the fifth step, after the first change of the masks."""
    where = Path(folder) / f"{name}_{rewind}"
    keep = ModelCheckpoint(where, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    prune, module = _rounds(where, rewind)
    settings = {"enable_checkpointing": True, "max_epochs": 2}
    trainer = trainer_of(cpu_strategies.strategy_of(name), folder, [prune, MaskEnforcer(), keep], **settings)
    trainer.fit(module, datamodule=batches())
    saved(where, "through", trainer, weights=weights_of(module), masks=dict(prune.masks))


def resume(folder, name, rewind):
    """The same from the checkpoint of the fifth step, on as many processes as this was started with."""
    devices = world_size()
    where = Path(folder) / f"{name}_{rewind}"
    prune, module = _rounds(where, rewind)
    spy = Spy(prune)
    strategy = cpu_strategies.strategy_of(name, devices)
    if "zero" in name and devices != 2:
        strategy.config["checkpoint"] = {"load_universal": True}
    trainer = trainer_of(strategy, folder, [prune, MaskEnforcer(), spy], max_epochs=2, devices=devices)
    trainer.fit(module, datamodule=batches(4 // devices), ckpt_path=where / "step=5.ckpt")
    what = {"weights": weights_of(module), "masks": dict(prune.masks), "worst": spy.worst}
    saved(where, f"resumed_on_{devices}", trainer, **what)


def _rounds(where, rewind):
    # Files to go back to are those of every rank, where the strategy shards; as many ranks must read them.
    prune = IterativePrune(IMPSchedule(0.75, 2, every=4), rewind=Rewind(1, dirpath=where) if rewind == "back" else None)
    return prune, Module()


def fail(folder):
    """On rank 1 alone an activation is not finite; nobody waits for it."""
    torch.manual_seed(0)
    module = Module()
    calibration = list(data(12).split(4))
    if dist.is_initialized():
        raise AssertionError("the trainer starts the processes' group")

    class Poison(Callback):
        def setup(self, trainer, pl_module, stage):
            if trainer.global_rank == 1:
                broken = pl_module.model.model.layers[1].mlp.down_proj
                broken.register_forward_pre_hook(lambda _, args: (args[0] * torch.nan,))

    prune = OneShotPrune(SparseGPT(Unstructured(0.5)), calibration, progress=False)
    trainer = trainer_of("ddp", folder, [Poison(), prune, MaskEnforcer()])
    try:
        trainer.fit(module, datamodule=batches())
    except ValueError as error:
        saved(folder, "failed", trainer, error=str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, *arguments = sys.argv[1:]
    globals()[scenario](*arguments)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
