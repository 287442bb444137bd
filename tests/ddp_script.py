"""Run by test_ddp.py: two processes prune, train and compare. Writes what every rank ended with."""

import sys

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from prune_callbacks import (
    CausalLM,
    IMPSchedule,
    IterativePrune,
    MaskEnforcer,
    OneShotPrune,
    Rewind,
    SparseGPT,
    Unstructured,
)
from prune_callbacks.tasks import tiny_llama

if __name__ == "__main__":
    torch.set_num_threads(1)
    data = torch.randint(3, 200, (40, 16), generator=torch.Generator().manual_seed(5))
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    folder, how = sys.argv[1:]
    one_shot = OneShotPrune(SparseGPT(Unstructured(0.5)), data.split(4), progress=False)
    iterative = IterativePrune(IMPSchedule(0.5, rounds=2, every=2), rewind=Rewind(1, dirpath=folder))
    prune, enforcer = {"one_shot": one_shot, "iterative": iterative}[how], MaskEnforcer()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=5,
        gradient_clip_val=0.5,
        callbacks=[prune, enforcer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, 4))
    state = {
        "weights": {name: p.detach() for name, p in module.named_parameters()},
        "masks": dict(enforcer.masks),
        "violations": enforcer.masks.violations(module.named_parameters()),
        "steps": trainer.global_step,
    }
    torch.save(state, f"{folder}/rank{trainer.global_rank}.pt")
    dist.barrier()
