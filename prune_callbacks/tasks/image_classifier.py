"""ImageClassifier: a LightningModule over a network that classifies images; SmallResNet: one for images of 8 x 8."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy


class ImageClassifier(LightningModule):
    """
    A LightningModule that trains a network on images and labels, and validates by accuracy.

    Batches are images, as the network takes them, and labels (batch,). Logs `train_loss`, `val_loss`, the mean over all
    images, and `val_accuracy`, the fraction of all images.

    Args:
        network: returns logits (batch, classes). The same object becomes `self.network`.
        classes: number of classes.
        optimizer: function that returns the optimizer for the parameters; AdamW with learning rate 1e-3 by default.
        scheduler: function that returns a learning-rate scheduler for the optimizer and `num_training_steps`; it is
            stepped at every optimizer step.
        scheduler_steps: the scheduler's `num_training_steps`; None: the length of the whole training. For
            `IterativePrune` with rewinding, the length of one round.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int = 10,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = partial(torch.optim.AdamW, lr=1e-3),  # noqa: B008
        scheduler: Callable[..., LRScheduler] | None = None,
        scheduler_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._scheduler_steps = scheduler_steps

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits (batch, classes)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns and logs the loss."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)
        self.log("val_loss", cross_entropy(logits, labels), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Returns one optimizer over all parameters, with the scheduler if one is given."""
        optimizer = self._optimizer(self.parameters())
        if self._scheduler is None:
            return optimizer
        steps = self._scheduler_steps or int(self.trainer.estimated_stepping_batches)
        scheduler = self._scheduler(optimizer, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SmallResNet(nn.Module):
    """
    A residual network (He et al. 2016) of three blocks for small images, with batch normalization.

    Args:
        width: channels of the first block; the others have twice as many.
        channels: channels of the images.
        classes: number of classes.
    """

    def __init__(self, width: int = 16, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width), ResidualBlock(width, 2 * width, stride=2), ResidualBlock(2 * width, 2 * width)
        )
        self.classify = nn.Linear(2 * width, classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Returns the logits."""
        hidden = torch.relu(self.norm(self.stem(images)))
        logits: Tensor = self.classify(self.blocks(hidden).mean((2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip connection, which is a convolution of 1 x 1 where the shapes differ."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outer)
        same = inner == outer and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the output (batch, outer, height / stride, width / stride)."""
        inside = torch.relu(self.first_norm(self.first(hidden)))
        return torch.relu(self.second_norm(self.second(inside)) + self.skip(hidden))
