"""A module that logs in all the ways that a validation can, and its data."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC


def rows(count=22, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] + torch.randn(count, generator=generator) > 0).float())


class Classifier(LightningModule):
    """Logs in all the ways that a validation can."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.accuracy, self.curve = BinaryAccuracy(), BinaryAUROC()
        self.several = MetricCollection({"mean": MeanMetric(), "again": MeanMetric()})
        self.seen = SumMetric()
        self.outputs = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self.net(x).squeeze(1), y)

    def on_validation_epoch_start(self):
        self.log("epoch_starts", 7)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert self.trainer.validating
        x, y = batch
        out = self.net(x).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(out, y)
        self.accuracy(out, y.int())
        self.curve.update(out, y.int())
        self.several.update(loss)
        self.seen.update(len(x))
        self.log("loss", loss, prog_bar=True)
        self.log("unweighted", loss, batch_size=1)
        self.log("forked", loss, on_step=True, on_epoch=True)
        self.log("in_steps_only", loss, on_step=True, on_epoch=False)
        self.log("greatest", out.max(), reduce_fx="max")
        self.log("least", out.min(), reduce_fx=torch.min)
        self.log_dict({"total": float(len(x)), "one": 1.0}, reduce_fx="sum")
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("curve", self.curve)
        self.log("seen", self.seen)
        self.log_dict(self.several)
        self.outputs.append(out)
        return {"out": out}

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.log("ends", outputs["out"].mean())

    def on_validation_epoch_end(self):
        self.log("spread", torch.cat(self.outputs).std())
        metrics = self.trainer.callback_metrics
        self.log("of_the_trainer", 2 * metrics.get("loss", metrics.get("loss/dataloader_idx_0")))
        self.outputs.clear()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(data=None, **settings):
    return DataLoader(rows() if data is None else data, batch_size=8, **settings)
