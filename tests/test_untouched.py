"""Steps of a module aside from training: nothing of them is left, and the same steps in the open leave much."""

import copy
import random

import numpy as np
import pytest
import torch
from fits import trainer_of
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC

from prune_callbacks.callbacks.untouched import untouched


class Busy(LightningModule):
    """A module whose steps change all that a step can change."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 1)
        )
        self.net[2].eval()  # modes differ
        self.register_buffer("steps", torch.zeros(2), persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(3))
        self.mean, self.curve = MeanMetric(), BinaryAUROC()
        self.outputs, self.counter, self.name, self.seen = [], 0, None, {0}
        self.history = {"loss": [1.0], "nested": {"a": (1, [2])}}
        self.average = torch.zeros(1)
        self.weights = [self.net[0].weight]
        self.view = self.net[4].weight.detach()

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(out, y)
        self.mean(loss)
        self.curve(out, y.int())
        self.steps += 1
        self.steps = self.steps * 2
        self.average.add_(loss.detach())
        self.outputs.append(loss)
        self.counter += 1
        self.name = "trained"
        self.seen.add(self.counter)
        self.history["loss"].append(2.0)
        self.history["nested"]["a"][1].clear()
        self.fresh = [torch.rand(1), random.random(), np.random.rand()]
        self.log("loss", loss, True, batch_size=len(x))
        self.log_dict({"mean": self.mean, "curve": self.curve}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": 1.0})
        self.logger.experiment.log_metrics({"direct": 1.0})
        for logger in self.loggers:
            logger.log_metrics({"each": 1.0})
        self.print("a step")
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
        if batch_idx == 3:
            raise RuntimeError("the step failed")
        return loss


def batch(size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size).float() % 2


def written(tmp_path):
    return sorted(path.name for path in tmp_path.rglob("*.csv"))


def state(module):
    """All that has to be as before, as values that can be compared by their bytes."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.detach().numpy().tobytes()
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items() if not callable(part)}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return value if isinstance(value, int | float | str | set | None) else None

    left_out = {"_trainer", "_modules", "_parameters"}
    modules = {
        name: plain(
            {
                key: copy.deepcopy(value) if isinstance(value, set) else value
                for key, value in vars(part).items()
                if key not in left_out
            }
        )
        for name, part in module.named_modules()
    }
    drawn = torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()
    grads = [None if p.grad is None else plain(p.grad) for p in module.parameters()]
    return {"modules": modules, "drawn": drawn, "grads": grads}


@pytest.fixture
def busy(tmp_path):
    trainer = trainer_of([], tmp_path, logger=CSVLogger(tmp_path))
    module = Busy()
    module.trainer = trainer
    module.net[4].weight.grad = torch.full_like(module.net[4].weight, 3.0)
    module.mean(1.5)
    module.curve(torch.tensor([0.2, 0.8]), torch.tensor([0, 1]))
    return trainer, module


def test_nothing_of_a_step_is_left(busy, tmp_path, capsys):
    trainer, module = busy
    before, identities = state(module), {name: id(b) for name, b in module.named_buffers()}
    logged, loggers = {}, trainer.loggers
    with untouched(trainer, module, lambda name, value, **settings: logged.setdefault(name, (value, settings))):
        assert not module.net.training
        assert not torch.is_grad_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
        loss = module.training_step(batch(), 0)
        module.training_step(batch(), 1)
    after = state(module)
    assert after == before
    assert {name: id(b) for name, b in module.named_buffers()} == identities
    assert (trainer.loggers, capsys.readouterr().out) == (loggers, "")
    trainer.logger.save()
    assert written(tmp_path) == []
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert "log" not in vars(module)
    assert list(logged) == ["loss", "mean", "curve"]
    assert torch.equal(logged["loss"][0], loss)
    assert logged["loss"][1] == {"prog_bar": True, "batch_size": 8}
    assert logged["mean"][0] is module.mean
    assert logged["curve"][1]["on_epoch"] is True


def test_the_same_step_in_the_open_changes_all_of_it(busy, tmp_path, capsys):
    trainer, module = busy
    module.log = module.log_dict = lambda *args, **settings: None  # Lightning's raise outside of a loop
    before = state(module)
    module.training_step(batch(), 0)
    after = state(module)
    assert {key for key in before if before[key] != after[key]} == {"modules", "drawn", "grads"}
    changed = {
        (name, key)
        for name, attributes in after["modules"].items()
        for key, value in attributes.items()
        if value != before["modules"][name].get(key)
    }
    ours = {"_buffers", "outputs", "counter", "name", "seen", "history", "average", "fresh"}
    assert {("", key) for key in ours} | {("net.1", "_buffers"), ("mean", "_update_count")} <= changed
    assert {("curve", "preds"), ("mean", "mean_value")} <= changed
    trainer.logger.save()
    assert written(tmp_path) == ["metrics.csv"]
    assert capsys.readouterr().out == "a step\n"


def test_nothing_is_left_after_an_error(busy):
    trainer, module = busy
    before, loggers = state(module), trainer.loggers
    with pytest.raises(RuntimeError, match="the step failed"), untouched(trainer, module):
        module.training_step(batch(), 3)
    assert state(module) == before
    assert trainer.loggers == loggers
    assert torch.is_grad_enabled()


def test_lightnings_own_log_raises_outside_of_a_loop(busy):
    _, module = busy
    with pytest.raises(Exception, match="result collection is not registered"):
        module.training_step(batch(), 0)


def test_pruning_inside_lasts(busy):
    trainer, module = busy
    weight = module.net[4].weight
    with untouched(trainer, module):
        module.training_step(batch(), 0)
        weight[:, :72] = 0
        module.net[0].weight.data.zero_()
        module.net[1].running_mean.fill_(5.0)
    assert weight[:, :72].count_nonzero() == 0
    assert weight.count_nonzero() == 72
    assert module.view.count_nonzero() == 72  # shares the memory of the weight
    assert module.net[0].weight.count_nonzero() == 0
    assert module.weights[0] is module.net[0].weight
    assert module.net[1].running_mean.count_nonzero() == 0


def test_one_inside_the_other(busy):
    trainer, module = busy
    before, outer, inner = state(module), [], []
    with untouched(trainer, module, lambda name, value, **settings: outer.append(name)):
        with untouched(trainer, module, lambda name, value, **settings: inner.append(name)):
            module.log("inner", 1.0)
        module.log("outer", 1.0)
    assert (outer, inner) == (["outer"], ["inner"])
    assert state(module) == before


def test_metrics_that_a_validation_has_left_in_inference_mode(busy):
    """`Trainer.validate` before the fit leaves states that may be written in inference mode only."""
    trainer, module = busy
    with torch.inference_mode():
        module.mean.reset()
        module.mean.update(2.0)
    with untouched(trainer, module):
        module.mean.reset()
        module.mean.update(7.0)
    assert module.mean.compute() == 2.0


def test_a_recurrent_layer_keeps_its_list_of_weights(tmp_path):
    class Recurrent(LightningModule):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 4)

    module, trainer = Recurrent(), trainer_of([], tmp_path)
    with untouched(trainer, module):
        module.gru.weight_hh_l0 = nn.Parameter(torch.zeros(12, 4))
    assert module.gru._flat_weights[1] is module.gru.weight_hh_l0
