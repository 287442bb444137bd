"""Trial runs - Tuner, fast_dev_run, overfit_batches, sanity checks - neither change nor measure for good."""

import math

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from prune_callbacks import (
    NM,
    CubicSchedule,
    IterativePrune,
    LoRARecovery,
    MaskEnforcer,
    OneShotPrune,
    PermuteChannels,
    QuantizeWeights,
    RunReport,
    SparsityMonitor,
    Unstructured,
    Wanda,
)
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.tasks import CausalLM, tiny_llama


class Data(LightningDataModule):
    """A few windows for everything."""

    evaluation_title = "windows"

    def setup(self, stage):
        windows = torch.randint(3, 200, (8, 2, 16), generator=torch.Generator().manual_seed(1))
        self.windows, self.evaluation_windows = windows, windows.flatten(0, 1)[:4]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.windows, batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.windows[:2], batch_size=None)


class Module(CausalLM):
    """A module with a learning rate to be found."""

    def __init__(self):
        super().__init__(tiny_llama(hidden_size=32, layers=2))
        self.lr = 1e-2

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr, weight_decay=0.1)


PRUNER = Wanda(Unstructured(0.5))


def callbacks_of(tmp_path):
    return [
        RunReport(tmp_path / "run", progress=False),
        OneShotPrune(PRUNER, num_batches=4, progress=False, dirpath=tmp_path / "run"),
        SparsityMonitor(tmp_path / "run"),
        QuantizeWeights(tmp_path / "run", num_batches=2, progress=False),
        MaskEnforcer(),
    ]


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and ".lr_find" not in path.name)


def real_fit(module, callbacks, tmp_path, **settings):
    trainer_of(callbacks, tmp_path, max_steps=3, accumulate_grad_batches=1, **settings).fit(module, datamodule=Data())
    return callbacks[0].run


def dense_perplexity():
    data = Data()
    data.setup("fit")
    return perplexity(Module().model, data.evaluation_windows, progress=False)


def search(module, callbacks, tmp_path):
    trainer = trainer_of(callbacks, tmp_path, max_steps=3, accumulate_grad_batches=1)
    found = Tuner(trainer).lr_find(module, datamodule=Data(), num_training=4, update_attr=False)
    assert len(found.results["lr"]) > 1


def scale(module, callbacks, tmp_path):
    trainer = trainer_of(callbacks, tmp_path, max_steps=3, accumulate_grad_batches=1)
    data = Data()
    data.batch_size = 1
    Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1)


def fast(module, callbacks, tmp_path):
    trainer_of(callbacks, tmp_path, accumulate_grad_batches=1, fast_dev_run=2).fit(module, datamodule=Data())


def overfit(module, callbacks, tmp_path):
    trainer_of(callbacks, tmp_path, max_steps=4, accumulate_grad_batches=1, overfit_batches=2).fit(
        module, datamodule=Data()
    )


@pytest.mark.parametrize("trial", [search, scale, fast, overfit], ids=lambda trial: trial.__name__)
def test_a_trial_run_leaves_the_model_as_it_was_and_writes_nothing(trial, tmp_path):
    module, callbacks = Module(), callbacks_of(tmp_path)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trial(module, callbacks, tmp_path)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert names(tmp_path) == []
    run = real_fit(module, callbacks, tmp_path)
    assert run.perplexity.dense == pytest.approx(dense_perplexity())
    assert run.perplexity.pruned != run.perplexity.dense
    assert len(run.training_loss) == 3
    assert callbacks[1].report.masks.violations(module.named_parameters()) == {}
    assert callbacks[1].report.sparsity == 0.5
    assert {"report.json", "masks.safetensors", "sparsity.png", "compression.json"} <= set(names(tmp_path))


def test_a_trial_run_prunes_and_holds_the_zeros_while_it_runs(tmp_path):
    seen = []

    class Watching(MaskEnforcer):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            seen.append((self.masks.sparsity(), self.weights.violations()))

    prune = OneShotPrune(PRUNER, num_batches=4, progress=False)
    fast(Module(), [prune, Watching()], tmp_path)
    assert seen == [(0.5, {}), (0.5, {})]


@pytest.mark.parametrize("trial", [search, fast], ids=lambda trial: trial.__name__)
def test_other_callbacks_in_a_trial_run(trial, tmp_path):
    for callbacks in (
        [IterativePrune(CubicSchedule(0.6, 0, 2)), MaskEnforcer()],
        [PermuteChannels(NM(2, 4), progress=False), OneShotPrune(Wanda(NM(2, 4)), progress=False), MaskEnforcer()],
        [OneShotPrune(PRUNER, progress=False), LoRARecovery(), MaskEnforcer()],
    ):
        module = Module()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        trial(module, callbacks, tmp_path)
        assert module.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_finder_among_the_callbacks_of_a_real_fit(tmp_path):
    module, finder = Module(), LearningRateFinder(num_training_steps=4, update_attr=False)
    run = real_fit(module, [*callbacks_of(tmp_path), finder], tmp_path)
    assert finder.optimal_lr is not None
    assert run.perplexity.dense == pytest.approx(dense_perplexity())
    assert all(math.isclose(zeros, 0.5, abs_tol=0.01) for zeros in run.sparsity.layers.values())
    assert run.violations == {}


def test_sanity_checks_measure_nothing(tmp_path):
    module, callbacks = Module(), callbacks_of(tmp_path)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    run = real_fit(module, [*callbacks, best], tmp_path, num_sanity_val_steps=2, enable_checkpointing=True)
    assert run.perplexity.dense == pytest.approx(dense_perplexity())
    assert run.optimizer_steps == 3


class FailsOnce(Module):
    """A module whose first training fails in its second step."""

    def __init__(self):
        super().__init__()
        self.fails = True
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.count += 1
        if self.fails and batch_idx == 1:
            self.fails = False
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("masked", [True, False])
def test_a_trial_run_that_fails_gives_the_weights_back_too(masked, tmp_path):
    module = FailsOnce()
    callbacks = [OneShotPrune(PRUNER, progress=False), LoRARecovery(masked=masked), MaskEnforcer()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(2):  # the second ends well
        if module.fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                fast(module, callbacks, tmp_path)
        else:
            fast(module, callbacks, tmp_path)
        assert module.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_buffers_and_what_configure_model_makes_are_given_back(precision, tmp_path):
    class Late(FailsOnce):
        def __init__(self):
            super().__init__()
            self.fails = False
            del self.model

        def configure_model(self):
            if not hasattr(self, "model"):
                self.model = tiny_llama(hidden_size=32, layers=2)
                with torch.no_grad():
                    for name, parameter in self.model.named_parameters():
                        if "proj" in name:
                            parameter[:, ::2] = 0
                self.dense = {name: value.clone() for name, value in self.state_dict().items()}

    module = Late()
    trainer = trainer_of([MaskEnforcer()], tmp_path, accumulate_grad_batches=1, fast_dev_run=2, precision=precision)
    trainer.fit(module, datamodule=Data())
    assert module.count == 0
    assert all(torch.equal(value, module.dense[name].to(value)) for name, value in module.state_dict().items())


def test_a_fit_that_failed_leaves_no_check_for_the_next(tmp_path):
    first, second = FailsOnce(), Module()
    prune, enforcer = OneShotPrune(PRUNER, progress=False), MaskEnforcer()
    trainer = trainer_of([prune, enforcer], tmp_path, max_steps=2, accumulate_grad_batches=1)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(first, datamodule=Data())
    assert [type(callback).__name__ for callback in trainer.callbacks if "All" in type(callback).__name__] == []
    trainer.fit(second, datamodule=Data())
    assert enforcer.masks.violations(second.named_parameters()) == {}


def test_a_resumed_trial_run_gives_the_weights_back(tmp_path):
    def callbacks():
        order = PermuteChannels(NM(2, 4), progress=False)
        return [order, OneShotPrune(Wanda(NM(2, 4)), progress=False), MaskEnforcer()]

    trainer = trainer_of(callbacks(), tmp_path, max_steps=1, accumulate_grad_batches=1)
    trainer.fit(Module(), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    again = trainer_of(callbacks(), tmp_path, accumulate_grad_batches=1, fast_dev_run=2)
    again.fit(module, datamodule=Data(), ckpt_path=tmp_path / "one.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
