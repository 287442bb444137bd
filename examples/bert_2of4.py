"""Trains a small BERT to say which package a docstring is from, prunes it to 2:4: python examples/bert_2of4.py."""

import ast
import random
import re
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification

from prune_callbacks import NM, MaskEnforcer, OneShotPrune, RunReport, SparseGPT

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
PADDING, UNKNOWN, LENGTH = 0, 1, 48


class Classifier(LightningModule):
    """A LightningModule over the BERT; batches are arguments of its forward."""

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


def docstrings(package):
    """Returns the words of all docstrings of at least eight words in a package of the standard library."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = {}
    for file in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
        found |= dict.fromkeys(" ".join(re.findall("[a-z]+", text.lower())) for text in texts)
    return [words for text in found if len(words := text.split()) >= 8]


def loaders(batch_size=32):
    """Returns loaders of three quarters of the docstrings, to train on, and of those held out; and the vocabulary."""
    labelled = [(words[:LENGTH], label) for label, package in enumerate(PACKAGES) for words in docstrings(package)]
    random.Random(0).shuffle(labelled)
    train, test = labelled[len(labelled) // 4 :], labelled[: len(labelled) // 4]
    counts = Counter(word for words, _ in train for word in words)
    ids = {word: place for place, word in enumerate(sorted(w for w in counts if counts[w] > 1), UNKNOWN + 1)}

    def collate(rows):
        tokens = [torch.tensor([ids.get(word, UNKNOWN) for word in words]) for words, _ in rows]
        padded = pad_sequence(tokens, batch_first=True, padding_value=PADDING)
        labels = torch.tensor([label for _, label in rows])
        return {"input_ids": padded, "attention_mask": (padded != PADDING).long(), "labels": labels}

    settings = {"batch_size": batch_size, "collate_fn": collate}
    return DataLoader(train, shuffle=True, **settings), DataLoader(test, **settings), len(ids) + 2


def main(folder, steps=400, recovery_steps=150):
    """Trains, prunes and fine-tunes; returns the fine-tuned module and the record of the run."""
    seed_everything(0, verbose=False)
    train, test, vocabulary = loaders()
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, pad_token_id=PADDING, num_labels=len(PACKAGES),
    )  # fmt: skip
    module = Classifier(BertForSequenceClassification(config), lr=2e-3)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "max_epochs": -1}
    Trainer(max_steps=steps, limit_val_batches=0, **quiet).fit(module, train, test)

    module.lr = 5e-4
    report = RunReport(folder, recipe="bert_2of4", model="small BERT")
    prune = OneShotPrune(SparseGPT(NM(2, 4)), num_batches=16)  # padding in the 16 batches does not count
    Trainer(max_steps=recovery_steps, callbacks=[report, prune, MaskEnforcer()], **quiet).fit(module, train, test)
    return module, report.run


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/bert_2of4/{time.strftime('%Y-%m-%d_%H-%M-%S')}"))
