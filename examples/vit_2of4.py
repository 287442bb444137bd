"""Trains a small ViT on handwritten digits, prunes it to 2:4 and fine-tunes it: python examples/vit_2of4.py."""

import sys
import time
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTForImageClassification

from prune_callbacks import NM, MaskEnforcer, OneShotPrune, RunReport, SparseGPT
from prune_callbacks.tasks import DigitsDataModule


class Classifier(LightningModule):
    """A LightningModule over the ViT; batches are arguments of its forward."""

    def __init__(self, model, lr):
        super().__init__()
        self.model = model.train()
        self.lr = lr
        self.val_accuracy = MulticlassAccuracy(model.config.num_labels, average="micro")

    def training_step(self, batch, batch_idx):
        """Returns the loss."""
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        """Logs the accuracy."""
        self.val_accuracy(self.model(**batch).logits, batch["labels"])
        self.log("val_accuracy", self.val_accuracy)

    def configure_optimizers(self):
        """Returns AdamW with a learning rate that falls to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders(batch_size=64):
    """Returns loaders of three quarters of the digits, to train on, and of those held out."""
    digits = DigitsDataModule()
    train, test = (
        [{"pixel_values": image, "labels": label} for image, label in part] for part in (digits.train, digits.test)
    )
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def main(folder, steps=700, recovery_steps=200):
    """Trains, prunes and fine-tunes; returns the fine-tuned module and the record of the run."""
    seed_everything(0, verbose=False)
    train, test = loaders()
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    module = Classifier(ViTForImageClassification(config), lr=2e-3)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "max_epochs": -1}
    Trainer(max_steps=steps, limit_val_batches=0, **quiet).fit(module, train, test)

    module.lr = 5e-4
    report = RunReport(folder, recipe="vit_2of4", model="small ViT")
    prune = OneShotPrune(SparseGPT(NM(2, 4)), num_batches=8)  # calibrated on 8 batches of the training data
    Trainer(max_steps=recovery_steps, callbacks=[report, prune, MaskEnforcer()], **quiet).fit(module, train, test)
    return module, report.run


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/vit_2of4/{time.strftime('%Y-%m-%d_%H-%M-%S')}"))
