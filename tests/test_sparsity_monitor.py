"""SparsityMonitor of a module that is no language model: weights of two, three and four dimensions."""

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prune_callbacks import MaskEnforcer, MaskSet, SparsityMonitor


class Images(LightningModule):
    def __init__(self):
        super().__init__()
        self.conv, self.line, self.head = nn.Conv2d(1, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(56, 2)

    def training_step(self, batch, batch_idx):
        rows = self.line(torch.relu(self.conv(batch[0])).flatten(2)[..., :16])
        return self.head(rows.flatten(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


NAMES = {"conv.weight": (4, 1, 3, 3), "line.weight": (4, 4, 3), "head.weight": (2, 56)}


def fit(tmp_path, *others):
    """The masks, and the monitor of a fit in which they are held."""
    masks = MaskSet({name: torch.rand(shape) < 0.5 for name, shape in NAMES.items()})
    monitor = SparsityMonitor(tmp_path, every_n_steps=2)
    images = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8)), batch_size=4)
    settings = {"max_steps": 4, "accumulate_grad_batches": 1, "logger": CSVLogger(tmp_path)}
    trainer_of([MaskEnforcer(masks), *others, monitor], tmp_path, **settings).fit(Images(), images)
    return masks, monitor


def test_layers_of_all_kinds_are_counted_and_drawn(tmp_path):
    masks, monitor = fit(tmp_path)
    assert [entry["step"] for entry in monitor.history] == [0, 2, 4]
    for entry in monitor.history:
        removed = {name: 1 - masks[name].float().mean().item() for name in NAMES}
        assert entry["sparsity"] == pytest.approx(removed)
        assert entry["violations"] == dict.fromkeys(NAMES, 0)
    assert (tmp_path / "sparsity.png").stat().st_size > 10_000
    logged = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert all(f"sparsity/{name}" in logged and f"violations/{name}" in logged for name in NAMES)


def test_a_convolution_that_is_overwritten_is_seen(tmp_path):
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.conv.weight.data.fill_(1.0)

    with pytest.raises(ValueError, match=r"pruned weights are not zero in the module .* the callbacks Spoil"):
        fit(tmp_path, Spoil())
