"""RunReport of modules without text: the quality is what they log in their own validation."""

import copy
import json

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, LightningModule
from runs import words
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from prune_callbacks import (
    CausalLM,
    IMPSchedule,
    IterativePrune,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    RunReport,
    TokenDataModule,
    Unstructured,
)
from prune_callbacks.measure.zero_shot import ZeroShot
from prune_callbacks.reporting.pictures import compare
from prune_callbacks.storage.run_folder import read_run
from prune_callbacks.storage.run_record import STAGES, RunRecord
from prune_callbacks.tasks import PythonDocs


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head, self.accuracy = nn.Linear(6, 1), BinaryAccuracy()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        self.accuracy(out, batch[1].int())
        self.log("val_loss", nn.functional.binary_cross_entropy_with_logits(out, batch[1]))
        self.log("val_accuracy", self.accuracy)
        self.log("val_endless", float("inf"))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(42, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).float()), batch_size=8)


def fit(callbacks, tmp_path, module, **settings):
    defaults = {"max_steps": 6, "accumulate_grad_batches": 1, "num_sanity_val_steps": 0}
    trainer_of(callbacks, tmp_path, **(defaults | settings)).fit(module, loader(), loader())


def validated(module, tmp_path):
    found = trainer_of([], tmp_path).validate(copy.deepcopy(module), loader(), verbose=False)[0]
    return {name: value for name, value in found.items() if name != "val_endless"}


class Copies(Callback):
    """Validates copies of the module, at the moments at which RunReport measures, from outside."""

    def __init__(self, tmp_path):
        self.tmp_path, self.found = tmp_path, {}

    def _copy(self, when, module):
        fresh = Classifier()
        fresh.load_state_dict(module.state_dict())
        self.found[when] = validated(fresh, self.tmp_path)

    def setup(self, trainer, pl_module, stage):
        self._copy("dense", pl_module)

    def on_train_start(self, trainer, pl_module):
        self._copy("pruned", pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._copy(f"{trainer.global_step} begins", pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._copy(trainer.global_step, pl_module)

    def on_train_end(self, trainer, pl_module):
        self._copy("recovered", pl_module)


def test_a_module_is_measured_by_its_own_validation(tmp_path, capsys):
    copies, report = Copies(tmp_path), RunReport(tmp_path / "run", recipe="mine", model="classifier", progress=False)
    one_shot = OneShotPrune(Magnitude(Unstructured(0.7)), progress=False)
    fit([copies, report, one_shot, MaskEnforcer()], tmp_path, Classifier())
    written = json.loads((tmp_path / "run/report.json").read_text())
    assert list(written["metrics"]) == ["val_loss", "val_accuracy", "val_endless"]
    for stage in STAGES:
        measured = {name: values[stage] for name, values in written["metrics"].items() if name != "val_endless"}
        assert measured == pytest.approx(copies.found[stage], rel=1e-5)
    assert copies.found["dense"] != copies.found["pruned"] != copies.found["recovered"]
    assert written["metrics"]["val_endless"] == dict.fromkeys(STAGES)
    assert written["perplexity"] == {"dataset": None, "seq_len": None} | dict.fromkeys(STAGES)
    assert written["stage"] == "recovered"
    assert len(written["training_loss"]) == 6
    again = Classifier()
    load_model(again, tmp_path / "run/model/model.safetensors")
    assert validated(again, tmp_path) == pytest.approx(copies.found["recovered"], rel=1e-6)
    assert MaskSet.load(tmp_path / "run/masks.safetensors").violations(again.named_parameters()) == {}
    printed = " ".join(capsys.readouterr().out.split())
    assert "what the module logs in its own validation" in printed
    assert f"│ {copies.found['recovered']['val_accuracy']:.4g} │" in printed
    assert "perplexity" not in printed
    text = words((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    values = written["metrics"]["val_loss"]
    assert f"val_loss {values['dense']:.4g} {values['pruned']:.4g} {values['recovered']:.4g}" in text
    assert "val_endless - - -" in text
    assert "as Trainer.validate would give it" in text
    assert "what pruning cost" not in text
    assert "erplexity" not in text
    assert "not complete" not in text
    assert "model/ is the sparse model (dense tensors with zeros)" in text
    assert (tmp_path / "run/report.png").stat().st_size > 10_000
    run = read_run(tmp_path / "run")
    assert run.missing == ()
    assert run.record == RunRecord.from_json(report.record)


def test_training_goes_on_as_without_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr("prune_callbacks.callbacks.page_on_time.PageOnTime.draw", lambda *_: None)
    trained = []
    for reports in ([], [RunReport(tmp_path / "run", progress=False)]):
        torch.manual_seed(0)
        module = Classifier()
        prune = IterativePrune(IMPSchedule(0.75, rounds=2, every=2))
        fit([*reports, prune, MaskEnforcer()], tmp_path, module)
        trained.append(module.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_rounds_have_metrics(tmp_path, capsys):
    copies, report = Copies(tmp_path), RunReport(tmp_path / "run", progress=False)
    fit([copies, report, IterativePrune(IMPSchedule(0.75, rounds=2, every=2)), MaskEnforcer()], tmp_path, Classifier())
    written = json.loads((tmp_path / "run/report.json").read_text())
    assert [entry["step"] for entry in written["rounds"]] == [2, 4, 6]
    for entry in written["rounds"]:
        measured = {name: value for name, value in entry["metrics"].items() if name != "val_endless"}
        assert measured == pytest.approx(copies.found[entry["step"]], rel=1e-5)
        assert entry["metrics"]["val_endless"] is None
        assert entry["perplexity"] is None
    for stage, when in (("dense", 2), ("pruned", "4 begins"), ("recovered", 6)):
        assert written["metrics"]["val_loss"][stage] == pytest.approx(copies.found[when]["val_loss"], rel=1e-5)
    text = words((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    assert "round optimizer step zeros val_loss val_accuracy val_endless 0 2 0.00 %" in text
    assert "Validation metrics of the trained model right before the masks changed" in text
    capsys.readouterr()
    compare({"one": report.run, "two": report.run}, tmp_path / "compared.png")
    assert (tmp_path / "compared.png").stat().st_size > 10_000
    assert "perplexity" not in capsys.readouterr().out


@pytest.fixture
def data(tokenizer):
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    return TokenDataModule(
        tokenizer, *corpora, seq_len=32, train_windows=8, calibration_windows=4, evaluation_windows=4
    )


def language(report, tmp_path, tiny, data):
    """The record after a fit of a copy of the model."""
    module = CausalLM(copy.deepcopy(tiny), lambda p: torch.optim.AdamW(p, lr=1e-2))
    callbacks = [report, OneShotPrune(Magnitude(Unstructured(0.5)), progress=False), MaskEnforcer()]
    trainer_of(callbacks, tmp_path, max_steps=2, num_sanity_val_steps=0).fit(module, datamodule=data)
    return report.record


def test_a_language_model_has_both_only_where_that_is_asked(tmp_path, tiny, data):
    """Its validation perplexity on the same windows is the perplexity."""
    records = {}
    for validation in (None, True):
        report = RunReport(tmp_path / str(validation), progress=False, validation=validation)
        records[validation] = language(report, tmp_path, tiny, data)
    assert records[None]["metrics"] == {}
    both = records[True]
    assert both["perplexity"] == records[None]["perplexity"]
    assert list(both["metrics"]) == ["val_loss", "val_perplexity"]
    for stage in STAGES:
        assert both["metrics"]["val_perplexity"][stage] == pytest.approx(both["perplexity"][stage], rel=1e-5)
    text = words((tmp_path / "True/report.html").read_text(encoding="utf-8"))
    assert "Validation metrics metric dense pruned recovered val_loss" in text
    assert "Perplexity (lower is better) on Python language reference" in text


def test_a_checkpoint_has_the_metrics(tmp_path):
    report = RunReport(tmp_path / "run", progress=False)
    report.run.metrics = {"val_loss": {"dense": 1.0, "pruned": 2.0, "recovered": None}}
    again = RunReport(tmp_path / "run", progress=False)
    again.load_state_dict(report.state_dict())
    assert again.run.metrics == report.run.metrics
    assert again.run.measured("dense")
    assert not again.run.measured("recovered")


class Silent(Classifier):
    validation_step = LightningModule.validation_step


@pytest.mark.parametrize(
    ("module", "arguments", "settings", "text"),
    [
        (
            Silent,
            {},
            {},
            "own validation metrics, and Silent has no validation_step: add one that logs .* Or give a data",
        ),
        (Classifier, {}, {"limit_val_batches": 0}, r"runs no validation \(limit_val_batches=0\): leave that out"),
        (
            Classifier,
            {"validation": False},
            {},
            r"RunReport\(validation=False\) needs a data module with evaluation_win",
        ),
        (
            Classifier,
            {"zero_shot": ZeroShot(["piqa"]), "tokenizer": 1},
            {},
            "are those of a transformers model, got Class",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_pruning(tmp_path, module, arguments, settings, text):
    plain, report = module(), RunReport(tmp_path / "run", progress=False, **arguments)
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match=text):
        fit(
            [report, OneShotPrune(Magnitude(Unstructured(0.7)), progress=False), MaskEnforcer()],
            tmp_path,
            plain,
            **settings,
        )
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not (tmp_path / "run").exists()
