"""Run by test_ddp.py: every process measures the module's validation before the first step. Writes what it found."""

import sys

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from validating import Classifier, loader

from prune_callbacks.callbacks.validation_metrics import validation_metrics


class Measures(Callback):
    def on_train_start(self, trainer, pl_module):
        torch.save(validation_metrics(trainer, pl_module), f"{sys.argv[1]}/rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Classifier()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1,
        num_sanity_val_steps=0,
        callbacks=[Measures()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader())
    dist.barrier()
