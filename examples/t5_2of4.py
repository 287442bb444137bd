"""Trains a small T5 to write words backwards, prunes its encoder and its decoder to 2:4: python examples/t5_2of4.py."""

import random
import re
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import T5Config, T5ForConditionalGeneration

from prune_callbacks import NM, MaskEnforcer, OneShotPrune, RunReport, SparseGPT

LENGTH = 6
START, FIRST_LETTER = 0, 1


class Writer(LightningModule):
    """A LightningModule over the T5; batches are arguments of its forward."""

    def __init__(self, model, lr):
        super().__init__()
        self.model = model.train()
        self.lr = lr
        self.val_accuracy = MulticlassAccuracy(model.config.vocab_size, average="micro")

    def training_step(self, batch, batch_idx):
        """Returns the loss."""
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        """Logs the fraction of letters that are right, each behind the right letters before it."""
        self.val_accuracy(self.model(**batch).logits.flatten(0, 1), batch["labels"].flatten())
        self.log("val_accuracy", self.val_accuracy)

    def configure_optimizers(self):
        """Returns AdamW with a learning rate that falls to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders(batch_size=64):
    """Returns loaders of three quarters of the pieces of words of Python's documentation, and of those held out."""
    words = sorted(set(re.findall("[a-z]+", " ".join(topics.values()))))
    pieces = sorted({word[at : at + LENGTH] for word in words for at in range(len(word) - LENGTH + 1)})
    random.Random(0).shuffle(pieces)
    rows = []
    for piece in pieces:
        letters = torch.tensor([ord(letter) - ord("a") + FIRST_LETTER for letter in piece])
        rows.append({"input_ids": letters, "labels": letters.flip(0)})
    test, train = rows[: len(rows) // 4], rows[len(rows) // 4 :]
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def main(folder, steps=800, recovery_steps=200):
    """Trains, prunes and fine-tunes; returns the fine-tuned module and the record of the run."""
    seed_everything(0, verbose=False)
    train, test = loaders()
    config = T5Config(
        vocab_size=28, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=16, decoder_start_token_id=START, pad_token_id=START,
    )  # fmt: skip
    module = Writer(T5ForConditionalGeneration(config), lr=3e-3)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "max_epochs": -1}
    Trainer(max_steps=steps, limit_val_batches=0, **quiet).fit(module, train, test)

    module.lr = 1e-3
    report = RunReport(folder, recipe="t5_2of4", model="small T5")
    prune = OneShotPrune(SparseGPT(NM(2, 4)), num_batches=8)  # calibrated on pieces of one length: no padding
    Trainer(max_steps=recovery_steps, callbacks=[report, prune, MaskEnforcer()], **quiet).fit(module, train, test)
    return module, report.run


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/t5_2of4/{time.strftime('%Y-%m-%d_%H-%M-%S')}"))
