"""DigitsDataModule: the handwritten digits that scikit-learn ships, for trying things on images without a download."""

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from prune_callbacks.tasks.loader import ResumableData


class DigitsDataModule(ResumableData):
    """
    A data module of 1797 handwritten digits (Alpaydin & Kaynak 1998), images of 8 x 8 pixels; needs scikit-learn.

    Batches are images (batch, 1, 8, 8) in float32, from -1 to 1, and labels (batch,) in int64. A share of every digit
    is held out, and is what `val_dataloader` and `test_dataloader` have. Ranks share the training images, and training
    that resumes goes on with the next batch, as in `TokenDataModule`.

    Args:
        batch_size: images per batch of each rank.
        test_share: the fraction of the images of every digit that is held out.
        split_seed: seed that draws the images held out.
        seed: seed of the order in which the others are trained on.

    Attributes:
        train: the images and labels to train on; `test`: those held out.

    Raises:
        ValueError: scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 64, test_share: float = 0.25, split_seed: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ValueError(
                "the handwritten digits are those of scikit-learn: pip install prune-callbacks[digits]"
            ) from error
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=test_share, stratify=labels, random_state=split_seed)
        train_images, test_images, train_labels, test_labels = map(torch.from_numpy, split)
        self.train = TensorDataset(_scaled(train_images), train_labels.long())
        self.test = TensorDataset(_scaled(test_images), test_labels.long())

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of shuffled training images, which resumes after the batches of a loaded checkpoint."""
        return self._shuffled(self.train)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of the images held out, in order."""
        return DataLoader(self.test, 2 * self.batch_size, generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns `val_dataloader()`."""
        return self.val_dataloader()


def _scaled(pixels: torch.Tensor) -> torch.Tensor:
    """Returns images (n, 1, 8, 8) from -1 to 1 of pixels (n, 64) from 0 to 16."""
    return (pixels.float() / 8 - 1).reshape(-1, 1, 8, 8)
