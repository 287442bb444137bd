"""A module's own validation, aside from training: the values are those of `Trainer.validate`."""

import copy

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn
from torchmetrics.classification import BinaryAccuracy
from validating import Classifier, loader, rows

from prune_callbacks.callbacks.validation_metrics import validation_metrics


class Measures(Callback):
    """Measures at every stage of a fit, on copies of the module's weights that are validated afterwards."""

    def __init__(self):
        self.found, self.copies = {}, {}

    def _measure(self, stage, trainer, module):
        generator = torch.get_rng_state()
        state = {name: value.clone() for name, value in module.state_dict().items()}
        callback_metrics = dict(trainer.callback_metrics)
        self.found[stage] = validation_metrics(trainer, module)
        self.copies[stage] = state
        assert torch.equal(generator, torch.get_rng_state())
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert dict(trainer.callback_metrics) == callback_metrics
        assert module.outputs == []
        assert not trainer.validating

    def setup(self, trainer, pl_module, stage):
        self._measure("setup", trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            self._measure("training", trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self._measure("end", trainer, pl_module)


def validated(state, tmp_path, loaders, **settings):
    """`Trainer.validate` of a module with these weights."""
    module = Classifier()
    module.load_state_dict(state)
    results = trainer_of([], tmp_path, **settings).validate(module, loaders, verbose=False)
    return {name: value for found in results for name, value in found.items()}


@pytest.mark.parametrize("several", [False, True], ids=["one loader", "several loaders"])
def test_the_values_are_those_of_a_validation(tmp_path, several):
    """At every stage of a fit, on several kinds of loggings, with a last batch of another size."""
    loaders = [loader(), loader(rows(13, seed=4))] if several else loader()
    measures = Measures()
    trainer_of([measures], tmp_path, max_steps=3, num_sanity_val_steps=0).fit(
        Classifier(), loader(shuffle=True), loaders
    )
    names = ["loss", "unweighted", "forked_epoch", "greatest", "least", "total", "one", "accuracy", "curve", "seen"]
    names += ["again", "mean", "ends"]
    ours = [f"{name}/dataloader_idx_{n}" for n in (0, 1) for name in names] if several else ["epoch_starts", *names]
    for stage, found in measures.found.items():
        expected = validated(measures.copies[stage], tmp_path, loaders)
        assert found == pytest.approx(expected, rel=1e-6)
        assert [name for name in found if name in ours] == ours
        assert {"epoch_starts", "spread", "of_the_trainer"} <= set(found)
        assert not any("in_steps_only" in name for name in found)
    assert measures.found["setup"] != measures.found["training"] != measures.found["end"]


def test_the_mean_of_the_batches_would_be_another(tmp_path):
    measures = Measures()
    trainer_of([measures], tmp_path, max_steps=1, num_sanity_val_steps=0).fit(Classifier(), loader(), loader())
    found = measures.found["setup"]
    assert found["unweighted"] != pytest.approx(found["loss"], rel=1e-3)


@pytest.mark.parametrize(("limit", "total"), [(2, 16), (0.34, 8), (1.0, 22)])
def test_the_trainers_limit_holds(tmp_path, limit, total):
    measures = Measures()
    trainer_of([measures], tmp_path, max_steps=1, num_sanity_val_steps=0, limit_val_batches=limit).fit(
        Classifier(), loader(), loader()
    )
    assert measures.found["setup"]["total"] == total
    assert measures.found["setup"] == pytest.approx(
        validated(measures.copies["setup"], tmp_path, loader(), limit_val_batches=limit), rel=1e-6
    )


def test_training_goes_on_as_without_measuring(tmp_path):
    """Weights, BatchNorm statistics and the optimizer's draws, with loaders that shuffle by generators of their own."""
    trained = []
    for callbacks in ([], [Measures()]):
        torch.manual_seed(0)
        module = Classifier()
        ours = loader(shuffle=True, generator=torch.Generator().manual_seed(5))
        trainer_of(callbacks, tmp_path, max_steps=4, num_sanity_val_steps=0).fit(module, loader(shuffle=True), ours)
        trained.append((module.state_dict(), ours.generator.get_state()))
    (plain, draws), (measured, draws_again) = trained
    assert all(torch.equal(value, measured[name]) for name, value in plain.items())
    assert torch.equal(draws, draws_again)


def test_the_data_of_a_data_module_and_of_the_module(tmp_path):
    class Data(LightningDataModule):
        def setup(self, stage):
            self.rows = rows()

        def train_dataloader(self):
            return loader(self.rows)

        val_dataloader = train_dataloader

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

    class Own(Classifier):
        val_dataloader = train_dataloader = lambda self: loader([(x + 1, y) for x, y in rows()])

    found = []
    for module, data in ((Classifier(), Data()), (Own(), None)):
        module.load_state_dict(copy.deepcopy(found[0][1] if found else module.state_dict()))
        measures = Measures()
        trainer_of([measures], tmp_path, max_steps=1, num_sanity_val_steps=0).fit(module, datamodule=data)
        found.append((measures.found["setup"], measures.copies["setup"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_trainers_precision_holds(tmp_path, precision):
    measures = Measures()
    trainer_of([measures], tmp_path, max_steps=1, num_sanity_val_steps=0, precision=precision).fit(
        Classifier(), loader(), loader()
    )
    before = "bf16-mixed" if precision == "bf16-mixed" else "32-true"  # the module is converted after setup
    for stage, how in (("setup", before), ("end", precision)):
        expected = validated(measures.copies[stage], tmp_path, loader(), precision=how)
        assert measures.found[stage] == pytest.approx(expected, rel=1e-6)


class WithoutStep(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)


class Late(Classifier):
    def setup(self, stage):
        self.rows = rows()

    def val_dataloader(self):
        return loader(self.rows)


class LateMetric(Classifier):
    def __init__(self):
        super().__init__()
        del self.accuracy

    def setup(self, stage):
        self.accuracy = BinaryAccuracy()


@pytest.mark.parametrize(
    ("module", "data", "settings", "text"),
    [
        (
            WithoutStep,
            loader,
            {},
            "WithoutStep has no validation_step: add one that logs them with self.log. Or give a",
        ),
        (Classifier, None, {}, "Classifier has no val_dataloader: add one, or pass val_dataloaders= to fit. Or give a"),
        (Classifier, loader, {"limit_val_batches": 0}, r"runs no validation \(limit_val_batches=0\): leave that out"),
        (Classifier, lambda: iter(loader()), {}, "the validation data is an iterator, which gives every batch once"),
        (
            LateMetric,
            loader,
            {},
            r"^validation of LateMetric failed \(AttributeError.* Its own setup\(\) has not run yet",
        ),
        (
            Late,
            None,
            {},
            r"val_dataloader of Late failed \(AttributeError.* Its own setup\(\) has not run yet: .*or give",
        ),
    ],
)
def test_what_is_missing_is_said(tmp_path, module, data, settings, text):
    trainer = trainer_of([], tmp_path, **settings)
    model = module()
    trainer.strategy.connect(model)
    trainer._data_connector.attach_data(model, loader(), data and data())  # as in the setup of a fit
    with pytest.raises(ValueError, match=text):
        validation_metrics(trainer, model)


def test_a_value_of_several_numbers_is_refused(tmp_path):
    class Several(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("several", batch[1])

    trainer, model = trainer_of([], tmp_path), Several()
    trainer.strategy.connect(model)
    trainer._data_connector.attach_data(model, loader(), loader())
    with pytest.raises(ValueError, match="the tensor must have a single element"):
        validation_metrics(trainer, model)
