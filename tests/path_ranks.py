"""Run by tests as processes: fits of a model built in __init__, and of the same built from its path."""

import sys
from functools import partial
from pathlib import Path

import cpu_strategies
import torch
import torch.distributed as dist
from hydra import initialize_config_dir
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_fits import Spy, batches, data, saved, trainer_of, weights_of, world_size
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune_callbacks import (
    NM,
    CausalLM,
    IMPSchedule,
    IterativePrune,
    LogitsDistillation,
    MaskEnforcer,
    OneShotPrune,
    Rewind,
    RunReport,
    SparseGPT,
    SquareHead,
)
from prune_callbacks.callbacks import save_model
from prune_callbacks.ranks import launched_ranks
from prune_callbacks.storage import model_parts
from prune_callbacks.streaming import checkpoint_perplexity
from prune_callbacks.tasks import causal_lm, teacher
from prune_callbacks.tasks.from_path import FromPath

OPENED = []


class Counted(FromPath):
    """Keeps itself, for the bytes that it reads; loads nothing whole where every rank has its part."""

    alone = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        OPENED.append(self)

    def whole(self):
        assert self.alone
        return super().whole()


def fit(folder, name, precision="32-true"):
    """Four optimizer steps from each way of building, with the zeros held."""
    counting(name)
    devices = world_size()
    for way in ("init", "path"):
        module = built(folder, way)
        assert way == "init" or next(module.parameters(), None) is None
        enforcer = MaskEnforcer(folder / "masks.safetensors")
        spy = Spy(enforcer)
        settings = {"max_steps": 4, "accumulate_grad_batches": 1, "devices": devices, "max_epochs": 2}
        settings["precision"] = precision
        trainer = trainer_of(cpu_strategies.strategy_of(name, devices), folder, [enforcer, spy], **settings)
        trainer.fit(module, datamodule=batches(4 // devices))
        what = {"losses": spy.losses, "worst": spy.worst, "weights": weights_of(module)}
        buffers = {key: value.detach().clone() for key, value in module.model.named_buffers()}
        read = OPENED[-1].reader.bytes_read if OPENED else None
        saved(folder, f"{name}_{way}", trainer, **what, buffers=buffers, read=read)


def built(folder, way):
    """The module, built in __init__ or later."""
    source, optimizer = folder / "model", partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    if way == "init":
        return CausalLM(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), optimizer)
    return CausalLM(path=source, optimizer=optimizer, dtype="float32")


def counting(name):
    """Counts what is read, and forbids models that are loaded whole where every rank has its part."""
    causal_lm.FromPath = Counted
    Counted.alone = name not in ("fsdp2", "zero3")


def pruned(folder, name):
    """Pruned when the fit begins, then twelve optimizer steps with a report; a checkpoint after five."""
    counting(name)
    save_model.parts_of = partial(model_parts.parts_of, most=1)  # as if the blocks were large
    for way in ("init", "path") if name != "ddp" else ("init",):
        where, module = folder / f"{name}_{way}", built(folder, way)
        prune = OneShotPrune(SparseGPT(NM(2, 4)), data(12).split(4), progress=False, dirpath=where)
        enforcer = MaskEnforcer()
        spy = Spy(enforcer)
        keep = ModelCheckpoint(where, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        callbacks = [RunReport(where, progress=False), prune, enforcer, spy, keep]
        settings = {"max_epochs": 2, "accumulate_grad_batches": 1, "enable_checkpointing": True}
        trainer = trainer_of(cpu_strategies.strategy_of(name), where, callbacks, **settings)
        trainer.fit(module, datamodule=batches())
        report = prune.report
        what = {"losses": spy.losses, "worst": spy.worst, "weights": weights_of(module), "masks": dict(report.masks)}
        what |= {"layers": [layer.name for layer in report.layers], "skipped": report.skipped}
        saved(folder, f"{name}_{way}", trainer, **what, files=str(prune.files))


def goes_on(folder, name):
    """From the checkpoint of the fifth step, on as many processes as this was started with."""
    counting(name)
    Counted.alone = Counted.alone or world_size() == 1
    devices, module = world_size(), built(folder, "path")
    prune = OneShotPrune(SparseGPT(NM(2, 4)), data(12).split(4), progress=False)
    enforcer = MaskEnforcer()
    spy = Spy(enforcer)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 1, "devices": devices}
    trainer = trainer_of(cpu_strategies.strategy_of(name, devices), folder, [prune, enforcer, spy], **settings)
    trainer.fit(module, datamodule=batches(4 // devices), ckpt_path=folder / f"{name}_path" / "step=5.ckpt")
    what = {"losses": spy.losses, "worst": spy.worst, "weights": weights_of(module), "masks": dict(prune.report.masks)}
    saved(folder, f"{name}_resumed_{devices}", trainer, **what)


def rounds(folder, name):
    """Two changes of the masks, with rewinding, of a model from each way of building."""
    counting(name)
    for way in ("init", "path"):
        prune = IterativePrune(IMPSchedule(0.75, rounds=2, every=4), rewind=Rewind(1, dirpath=folder / f"{name}_{way}"))
        module, spy = built(folder, way), Spy(prune)
        settings = {"accumulate_grad_batches": 1, "max_epochs": 2}
        callbacks = [prune, MaskEnforcer(), spy]
        trainer = trainer_of(cpu_strategies.strategy_of(name), folder, callbacks, **settings)
        trainer.fit(module, datamodule=batches())
        what = {"worst": spy.worst, "losses": spy.losses, "weights": weights_of(module), "masks": dict(prune.masks)}
        saved(folder, f"{name}_{way}", trainer, **what)


OBJECTIVES = {"logits": LogitsDistillation, "squarehead": SquareHead}


def distilled(folder, name, objective):
    """Three steps with a teacher that every rank holds whole, and with one that it holds a part of."""
    counting(name)
    teacher.FromPath = Counted
    for way in ("whole", "path"):
        given = folder / "model"
        if way == "whole":
            given = AutoModelForCausalLM.from_pretrained(given, dtype=torch.float32)
        loss = OBJECTIVES[objective](given, dtype="float32")
        optimizer = partial(torch.optim.AdamW, lr=1e-2)
        module = CausalLM(path=folder / "model", optimizer=optimizer, objective=loss, dtype="float32")
        settings = {"max_steps": 3, "accumulate_grad_batches": 1, "use_distributed_sampler": False}
        enforcer = MaskEnforcer(folder / "masks.safetensors")
        spy = Spy(enforcer)
        trainer = trainer_of(cpu_strategies.strategy_of(name), folder, [enforcer, spy], **settings)
        rows = data(12)[trainer.global_rank :: 2]
        labels = rows.clone()
        labels[2 : 4 * trainer.global_rank] = -100  # the second batch of the second rank: nothing is predicted
        loader = DataLoader([{"input_ids": r, "labels": t} for r, t in zip(rows, labels, strict=True)], batch_size=2)
        trainer.fit(module, loader)
        held = sum(
            p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in loss.teacher.model.parameters()
        )
        read = OPENED[-1].reader.bytes_read
        saved(folder, f"{name}_{objective}_{way}", trainer, losses=spy.losses, held=held, read=read)


def resident(kind):
    """The bytes of this process that are in memory now (VmRSS), or were at most (VmHWM) since `from_here`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def from_here():
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


class Sized(CausalLM):
    """Notes the peak of memory when it has been built, and when training begins."""

    peaks = None

    def configure_model(self):
        super().configure_model()
        self.peaks = {"built": resident("VmHWM")}

    def on_train_start(self):
        self.peaks["training"] = resident("VmHWM")


def memory(folder, name, way, source):
    """The peak of memory until training begins, above what was there before the model."""
    counting(name)
    if "zero" in name:
        import deepspeed  # noqa: F401 (before the first measurement)
    strategy = cpu_strategies.strategy_of(name, world_size())
    trainer = trainer_of(strategy, folder, [], max_steps=1, accumulate_grad_batches=1, devices=world_size())
    optimizer = partial(torch.optim.SGD, lr=1e-3)
    before = from_here()
    if way == "init":
        module = Sized(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), optimizer)
    else:
        module = Sized(path=source, optimizer=optimizer, dtype="float32")
    trainer.fit(module, datamodule=batches(1))
    peaks = {when: peak - before for when, peak in module.peaks.items()}
    saved(folder, f"{name}_{way}_{world_size()}", trainer, peaks=peaks)


def recipe(folder, *words):
    """train.py, in which no model is loaded whole."""
    import train

    counting("fsdp2")
    whole = PreTrainedModel.from_pretrained.__func__

    def refused(cls, *arguments, **settings):
        raise AssertionError("a whole model was loaded")

    PreTrainedModel.from_pretrained = classmethod(refused)
    with initialize_config_dir(str(train.RECIPES.folder), version_base="1.3"):
        train.run([*words, f"output_dir={folder / 'run'}"])
    PreTrainedModel.from_pretrained = classmethod(whole)
    rank = dist.get_rank()
    torch.save({"read": OPENED[-1].reader.bytes_read}, folder / f"recipe_{rank}.pt")


def measured(folder):
    """The perplexity of a checkpoint, over five windows and over one."""
    windows = torch.load(folder / "windows.pt")
    with launched_ranks(torch.device("cpu")) as ranks:
        for count in (5, 1):
            where = folder / f"work_{count}"
            value = checkpoint_perplexity(
                folder / "model", windows[:count], where, batch_size=2, progress=False, ranks=ranks
            )
            torch.save({"perplexity": value}, folder / f"measured_{count}_{ranks.rank}.pt")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
