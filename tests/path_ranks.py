"""Run by tests as processes: fits of a model built in __init__, and of the same built from its path."""

import sys
from functools import partial
from pathlib import Path

import cpu_strategies
import torch
from rank_fits import Spy, batches, saved, trainer_of, weights_of, world_size
from transformers import AutoModelForCausalLM

from prune_callbacks import CausalLM, MaskEnforcer
from prune_callbacks.tasks import causal_lm
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


def fit(folder, name):
    """Four optimizer steps from each way of building, with the zeros held."""
    source, devices = folder / "model", world_size()
    causal_lm.FromPath = Counted
    Counted.alone = name not in ("fsdp2", "zero3")
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for way in ("init", "path"):
        if way == "init":
            module = CausalLM(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), optimizer)
        else:
            module = CausalLM(path=source, optimizer=optimizer, dtype="float32")
            assert next(module.parameters(), None) is None
        enforcer = MaskEnforcer(folder / "masks.safetensors")
        spy = Spy(enforcer)
        settings = {"max_steps": 4, "accumulate_grad_batches": 1, "devices": devices, "max_epochs": 2}
        trainer = trainer_of(cpu_strategies.strategy_of(name, devices), folder, [enforcer, spy], **settings)
        trainer.fit(module, datamodule=batches(4 // devices))
        what = {"losses": spy.losses, "worst": spy.worst, "weights": weights_of(module)}
        buffers = {key: value.detach().clone() for key, value in module.model.named_buffers()}
        read = OPENED[-1].reader.bytes_read if OPENED else None
        saved(folder, f"{name}_{way}", trainer, **what, buffers=buffers, read=read)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
