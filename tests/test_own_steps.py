"""Calibration runs a module's own step, and leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from fits import trainer_of
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from zoo import ResNet

from prune_callbacks import (
    IterativePrune,
    LinearSchedule,
    Magnitude,
    MaskEnforcer,
    OneShotPrune,
    Unstructured,
    Wanda,
    prune_sequentially,
)

HALF = Unstructured(0.5)


class Told(Logger):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    name = version = "told"

    def log_metrics(self, metrics, step=None):
        self.metrics.append(metrics)

    def log_hyperparams(self, params):
        pass


class Classifier(LightningModule):
    """BatchNorm, dropout, random noise, metrics, lists and a logger used directly, in its training step."""

    def __init__(self):
        super().__init__()
        self.net, self.drop, self.mean = ResNet(), nn.Dropout(0.5), MeanMetric()
        self.losses, self.seen = [], 0

    def forward(self, x):
        return self.net(self.drop(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x + 0.01 * torch.randn_like(x)), y)
        random.random(), np.random.rand()
        self.mean.update(loss)
        self.losses.append(loss.detach())
        self.seen += 1
        self.log("loss", loss, on_step=True)
        for logger in self.loggers:
            logger.log_metrics({"direct": 1.0})
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def batches(count=3):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 3, 9, 9, generator=generator), torch.arange(6) % 4) for _ in range(count)]


def made(kind=Classifier):
    torch.manual_seed(0)
    return kind()


def fit(module, callbacks, tmp_path, data=None, **settings):
    settings = {"max_steps": 2, "accumulate_grad_batches": 1} | settings
    trainer = trainer_of(callbacks, tmp_path, **settings)
    trainer.fit(module, DataLoader(data or batches(), batch_size=None))
    return trainer


def state(module):
    """Everything that a calibration must leave as it is, as bytes and values."""
    return {
        "buffers": {name: value.clone() for name, value in module.named_buffers()},
        "training": {name: part.training for name, part in module.named_modules()},
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
        "metric": (module.mean.mean_value.clone(), module.mean._update_count),
        "lists": (len(module.losses), module.seen),
        "gradients": [parameter.grad for parameter in module.parameters()],
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Around(OneShotPrune):
    """Notes the state of the module just before and after pruning."""

    def setup(self, trainer, pl_module, stage):
        self.before = state(pl_module)
        super().setup(trainer, pl_module, stage)
        self.after = state(pl_module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["sequential", "at_once"])
def test_calibration_leaves_no_trace(tmp_path, order):
    module, told = made(), Told()
    module.eval()
    module.net.layers[0].train()  # a mixture of modes
    dense = copy.deepcopy(module.state_dict())
    prune = Around(Wanda(HALF), num_batches=2, order=order, progress=False)
    fit(module, [prune, MaskEnforcer()], tmp_path, logger=told, max_steps=1)
    assert same(prune.before, prune.after)
    assert sum("direct" in metrics for metrics in told.metrics) == 1  # that of the one training step
    assert prune.report.masks.violations(module.named_parameters()) == {}
    # The control: the step by itself changes all of it, but for the modes and gradients.
    control = made()
    control.load_state_dict(dense)
    control.log, control._trainer = (lambda *args, **settings: None), trainer_of([], tmp_path)
    before = state(control)
    control.training_step(batches()[0], 0)
    changed = {key for key, value in state(control).items() if not same(before[key], value)}
    assert changed == {"buffers", "random", "metric", "lists"}


def test_training_draws_what_it_draws_without_pruning(tmp_path):
    """With every weight kept, a fit with pruning ends as one without, bit for bit."""
    found = []
    for callbacks in ([], [OneShotPrune(Wanda(Unstructured(0.0)), num_batches=2, progress=False), MaskEnforcer()]):
        module = made()
        torch.manual_seed(5)
        fit(module, callbacks, tmp_path)
        found.append(module.state_dict())
    assert same(*found)


@pytest.mark.filterwarnings("ignore")
def test_the_step_s_inputs_are_what_counts(tmp_path):
    """A step that scales its images gives other statistics than the network on the images as they are."""

    class Scaled(Classifier):
        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.net(batch[0] * torch.linspace(0, 9, 9)), batch[1])

    module, reference = made(Scaled), made(Scaled)
    prune = OneShotPrune(Wanda(HALF), num_batches=3, progress=False)
    fit(module, [prune, MaskEnforcer()], tmp_path)
    reference.eval()
    scaled = [x * torch.linspace(0, 9, 9) for x, _ in batches()]
    expected = prune_sequentially(copy.deepcopy(reference.net), scaled, Wanda(HALF), progress=False)
    plain = prune_sequentially(copy.deepcopy(reference.net), [x for x, _ in batches()], Wanda(HALF), progress=False)
    ours = {name.removeprefix("net."): prune.report.masks[name] for name in prune.report.masks}
    assert all(torch.equal(ours[name], expected.masks[name]) for name in expected.masks)
    assert expected.masks != plain.masks  # the control


@pytest.mark.filterwarnings("ignore")
def test_a_function_of_module_and_batch_runs_it(tmp_path):
    class Elsewhere(Classifier):
        def training_step(self, batch, batch_idx):
            assert self.trainer.training, "calibration must not come here"
            return super().training_step(batch, batch_idx)

    calls = []

    def forward(module, batch):
        calls.append(batch)
        return module.net(batch[0])

    prune = OneShotPrune(Wanda(HALF), num_batches=3, forward=forward, progress=False)
    fit(made(Elsewhere), [prune, MaskEnforcer()], tmp_path)
    assert len(calls) >= 3
    reference = made(Elsewhere).eval()
    report = prune_sequentially(
        reference.net, batches(), Wanda(HALF), forward=lambda net, batch: net(batch[0]), progress=False
    )
    assert {name.removeprefix("net.") for name in prune.report.masks} == set(report.masks)
    assert all(torch.equal(prune.report.masks[f"net.{name}"], keep) for name, keep in report.masks.items())


@pytest.mark.filterwarnings("ignore")
def test_under_manual_optimization_it_is_the_validation_step(tmp_path):
    class Manual(Classifier):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = functional.cross_entropy(self(batch[0]), batch[1])
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    class Validated(Manual):
        def validation_step(self, batch):
            return self.net(batch[0])

    prune = OneShotPrune(Wanda(HALF), num_batches=2, progress=False)
    with pytest.raises(
        ValueError,
        match=r"calibration runs validation_step of Manual, since its training_step steps optimizers by hand, and it "
        r"has none. Define it, or say how the module runs on a batch: OneShotPrune\(..., forward=lambda module",
    ):
        fit(made(Manual), [prune, MaskEnforcer()], tmp_path, gradient_clip_val=None)
    module = made(Validated)
    fit(module, [prune, MaskEnforcer()], tmp_path, gradient_clip_val=None)
    assert prune.report.masks.sparsity() == pytest.approx(0.5, abs=0.01)
    assert prune.report.masks.violations(module.named_parameters()) == {}


@pytest.mark.filterwarnings("ignore")
def test_hooks_of_the_transfer_run_and_a_step_may_take_the_batch_alone(tmp_path):
    class Wrapped:
        """A batch of a class of one's own."""

        def __init__(self, x, y):
            self.x, self.y = x, y

    class Hooked(Classifier):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return Wrapped(batch.x.to(device), batch.y.to(device))

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch.x * torch.linspace(0, 9, 9), batch.y

        def training_step(self, batch):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

    data = [Wrapped(x, y) for x, y in batches()]
    prune = OneShotPrune(Wanda(HALF), num_batches=3, progress=False)
    fit(made(Hooked), [prune, MaskEnforcer()], tmp_path, data)
    scaled = [x * torch.linspace(0, 9, 9) for x, _ in batches()]
    expected = prune_sequentially(made(Hooked).eval().net, scaled, Wanda(HALF), progress=False)
    assert all(torch.equal(prune.report.masks[f"net.{name}"], keep) for name, keep in expected.masks.items())


def test_layers_that_are_made_after_pruning_are_an_error(tmp_path):
    class Late(Classifier):
        def configure_model(self):
            self.more = nn.Linear(4, 4)

    with pytest.raises(ValueError, match=r"Late has made 1 layers after OneShotPrune has pruned, first more.weight"):
        fit(made(Late), [OneShotPrune(Magnitude(HALF), progress=False), MaskEnforcer()], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_an_error_in_the_step_leaves_the_module_as_it_was(tmp_path):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if self.seen == 1:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module = made(Failing)
    before = state(module)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, [OneShotPrune(Wanda(HALF), progress=False), MaskEnforcer()], tmp_path)
    assert same(before, state(module))
    assert "log" not in vars(module)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_draws_noise_draws_the_same_for_every_stage(tmp_path):
    """Later stages are calibrated on the noise that the first stage was calibrated on, so layers fit each other."""
    seen = []

    class Noisy(Classifier):
        def training_step(self, batch, batch_idx):
            noise = torch.randn(1)
            seen.append(float(noise))
            return functional.cross_entropy(self.net(batch[0] + noise), batch[1])

    module = made(Noisy)
    prune_sequentially(
        module.net, batches(2), Wanda(HALF), forward=lambda net, batch: module.training_step(batch, 0), progress=False
    )
    assert len(set(seen)) == 2
    assert len(seen) > 6


@pytest.mark.filterwarnings("ignore")
def test_pruning_in_rounds_and_a_log_of_a_module_of_one_s_own(tmp_path):
    module, told = made(), CSVLogger(tmp_path)
    rounds = IterativePrune(LinearSchedule(0.8, begin=0, end=4))
    fit(module, [rounds, MaskEnforcer()], tmp_path, logger=told, max_steps=6)
    assert rounds.masks.sparsity() == pytest.approx(0.8, abs=1e-3)
    assert rounds.masks.violations(module.named_parameters()) == {}
    assert not any("head" in name for name in rounds.masks)
