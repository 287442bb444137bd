import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from prune_callbacks import NM, CausalLM, Magnitude, MaskEnforcer, MaskSet, OneShotPrune, RunReport, TokenDataModule
from prune_callbacks.evaluation import perplexity
from prune_callbacks.evaluation.report import draw_report
from prune_callbacks.tasks import PythonDocs


@pytest.fixture
def data(tokenizer):
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    return TokenDataModule(
        tokenizer, *corpora, seq_len=32, train_windows=24, calibration_windows=4, evaluation_windows=4
    )


def fit(callbacks, tmp_path, module, data):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


def test_the_numbers_are_those_of_the_models(tmp_path, tiny, data):
    """Dense, pruned and recovered perplexity, each measured again from outside."""
    data.setup("fit")
    expected = {"dense": perplexity(tiny, data.evaluation_windows, progress=False)}
    module = CausalLM(tiny, lambda p: torch.optim.AdamW(p, lr=1e-2))
    one_shot = OneShotPrune(Magnitude(NM(2, 4)), save_dir=tmp_path / "pruned", progress=False)
    report = RunReport(tmp_path / "run", recipe="mine", model="tiny", progress=False)
    fit([report, one_shot, MaskEnforcer()], tmp_path, module, data)
    pruned = type(tiny).from_pretrained(tmp_path / "pruned/model")
    recovered = type(tiny).from_pretrained(tmp_path / "run/model")
    expected["pruned"] = perplexity(pruned, data.evaluation_windows, progress=False)
    expected["recovered"] = perplexity(recovered, data.evaluation_windows, progress=False)
    written = json.loads((tmp_path / "run/report.json").read_text())
    measured = {stage: written["perplexity"][stage] for stage in expected}
    assert measured == pytest.approx(expected, rel=1e-5)
    assert measured["recovered"] < measured["pruned"]
    assert written["training_loss"][0][0] == 1
    assert len(written["training_loss"]) == 6
    masks = MaskSet.load(tmp_path / "run/masks.safetensors")
    assert written["sparsity"]["layers"] == pytest.approx(masks.layer_sparsity())
    assert (tmp_path / "run/report.png").stat().st_size > 10_000
    assert not list((tmp_path / "run").glob("*.partial"))


def test_zeros_are_counted_in_the_weights(tmp_path, tiny, data):
    """Without an enforcer they are lost, and the report says so."""
    module = CausalLM(tiny, lambda p: torch.optim.AdamW(p, lr=1e-2))
    report = RunReport(tmp_path, progress=False)
    with pytest.warns(UserWarning, match="will not last"):
        fit([report, OneShotPrune(Magnitude(NM(2, 4)), progress=False)], tmp_path, module, data)
    assert report.record["sparsity"]["achieved"] < 0.01
    assert sum(report.record["violations"].values()) > 1000


def test_a_half_finished_report_is_drawn(tmp_path, tiny, data):
    report = RunReport(tmp_path / "run", progress=False)
    fit([report, OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer()], tmp_path, CausalLM(tiny), data)
    record = report.record | {"training_loss": []}
    record["perplexity"] = record["perplexity"] | {"recovered": None}
    draw_report(record, tmp_path / "half.png")
    assert (tmp_path / "half.png").stat().st_size > 10_000


def test_bad_settings_are_refused_before_work(tmp_path, tiny, data):
    one_shot, report = OneShotPrune(Magnitude(NM(2, 4)), progress=False), RunReport(tmp_path / "run", progress=False)
    for callbacks in ([one_shot, report], [report]):
        with pytest.raises(ValueError, match="RunReport needs one OneShotPrune after it among the callbacks, found"):
            fit(callbacks, tmp_path, CausalLM(tiny), data)
    (tmp_path / "run/model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"already holds a run \(model\)"):
        fit([report, one_shot], tmp_path, CausalLM(tiny), data)


def test_a_model_that_cannot_be_saved_is_refused_before_pruning(tmp_path, data):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

        def configure_optimizers(self):
            return None

        def training_step(self, batch, batch_idx):
            return None

    one_shot = OneShotPrune(Magnitude(NM(2, 4)), save_dir=tmp_path / "out", progress=False)
    module = Plain()
    with (
        pytest.warns(UserWarning, match="will not last"),
        pytest.raises(ValueError, match="only transformers models can be saved, got Plain"),
    ):
        fit([one_shot], tmp_path, module, data)
    assert module.layers[0].weight.count_nonzero() == 16
