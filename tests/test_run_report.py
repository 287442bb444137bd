import copy
import json
import shutil

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from prune_callbacks import (
    NM,
    CausalLM,
    ConstantSchedule,
    IMPSchedule,
    IterativePrune,
    LinearSchedule,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    Rewind,
    RunReport,
    SparsityMonitor,
    TokenDataModule,
)
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.reporting.pictures import compare, draw_report
from prune_callbacks.storage.model_folder import save_sparse_model
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
    one_shot = OneShotPrune(Magnitude(NM(2, 4)), dirpath=tmp_path / "pruned", progress=False)
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
    report.run.training_loss, report.run.perplexity.recovered = [], None
    draw_report(report.run, tmp_path / "half.png")
    assert (tmp_path / "half.png").stat().st_size > 10_000


def test_bad_settings_are_refused_before_work(tmp_path, tiny, data):
    one_shot, report = OneShotPrune(Magnitude(NM(2, 4)), progress=False), RunReport(tmp_path / "run", progress=False)
    for callbacks in ([one_shot, report], [report]):
        with pytest.raises(
            ValueError, match="RunReport needs one OneShotPrune or IterativePrune, or one of each, after it"
        ):
            fit(callbacks, tmp_path, CausalLM(tiny), data)
    (tmp_path / "run/model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"already holds a run \(model\)"):
        fit([report, one_shot], tmp_path, CausalLM(tiny), data)


def test_the_page_is_drawn_while_the_fit_goes_on(tmp_path, tiny, data, monkeypatch):
    drawn = {}

    class Looks(Callback):
        def on_train_batch_end(self, trainer, *_):
            drawn[trainer.global_step] = (tmp_path / "run/report.html").exists()

    for every in (30.0, 0.0):
        monkeypatch.setattr("prune_callbacks.callbacks.page_on_time.DRAWN_EVERY", every)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        module = CausalLM(copy.deepcopy(tiny), lambda p: torch.optim.AdamW(p, lr=1e-2))
        report = RunReport(tmp_path / "run", progress=False)
        fit(
            [report, OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer(), Looks()], tmp_path, module, data
        )
        assert set(drawn.values()) == {every == 0}
        assert (tmp_path / "run/report.html").exists()
        assert (tmp_path / "run/report.png").exists()


def test_a_fit_that_fails_leaves_a_page_that_says_so(tmp_path, tiny, data):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("out of memory")

    module = CausalLM(tiny, lambda p: torch.optim.AdamW(p, lr=1e-2))
    report = RunReport(tmp_path / "run", progress=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(
            [report, OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer(), Fails()], tmp_path, module, data
        )
    assert "This run is not complete" in (tmp_path / "run/report.html").read_text()


def test_rounds_are_measured_before_every_change(tmp_path, tiny, data):
    """Every perplexity again, on copies of the weights taken at the same moments by a callback in front."""
    data.setup("fit")
    measured = {}

    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            measured[trainer.global_step] = perplexity(pl_module.model, data.evaluation_windows, progress=False)

        def on_train_batch_start(self, trainer, pl_module, *_):
            measured[f"{trainer.global_step} begins"] = perplexity(
                pl_module.model, data.evaluation_windows, progress=False
            )

    module = CausalLM(tiny, lambda p: torch.optim.AdamW(p, lr=1e-2))
    report = RunReport(tmp_path / "run", progress=False)
    prune = IterativePrune(IMPSchedule(0.8, rounds=2, every=2), rewind=Rewind(1))
    monitor = SparsityMonitor(tmp_path / "run", every_n_steps=3)
    fit([Copies(), report, prune, MaskEnforcer(), monitor], tmp_path, module, data)
    written = json.loads((tmp_path / "run/report.json").read_text())
    assert [entry["step"] for entry in written["rounds"]] == [2, 4, 6]
    assert [entry["perplexity"] for entry in written["rounds"]] == pytest.approx([measured[t] for t in (2, 4, 6)])
    assert written["perplexity"]["dense"] == pytest.approx(measured[2])
    assert written["perplexity"]["pruned"] == pytest.approx(measured["4 begins"])
    assert written["perplexity"]["recovered"] == pytest.approx(measured[6])
    total = sum(m.numel() for m in prune.masks.values())
    kept = [round((1 - entry["sparsity"]) * total) for entry in written["rounds"]]
    assert kept == [total, total - round((1 - 0.2**0.5) * total), total - round(0.8 * total)]
    assert written["sparsity"]["achieved"] == pytest.approx(0.8, abs=1e-4)
    assert written["violations"] == {}
    # The monitor: at the start, at both changes, at step 3, at the end.
    assert [entry["step"] for entry in monitor.history] == [0, 2, 3, 4, 6]
    assert monitor.history[-1]["sparsity"] == pytest.approx(prune.masks.layer_sparsity())
    assert not any(any(entry["violations"].values()) for entry in monitor.history)
    assert (tmp_path / "run/sparsity.png").stat().st_size > 10_000


def test_only_the_first_round_is_measured_where_that_is_asked(tmp_path, tiny, data):
    report = RunReport(tmp_path / "run", every_round=False, progress=False)
    prune = IterativePrune(LinearSchedule(0.5, 0, 4))
    fit([report, prune, MaskEnforcer()], tmp_path, CausalLM(tiny), data)
    assert [entry["step"] for entry in report.record["rounds"]] == [1, 6]
    assert report.record["changes"] == [1, 2, 3, 4]
    compare({"one": report.run, "two": report.run}, tmp_path / "compared.png")
    assert (tmp_path / "compared.png").stat().st_size > 10_000


def test_a_loss_that_is_no_number_is_reported_as_none(tmp_path, tiny, data):
    class Nan(CausalLM):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    report = RunReport(tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="."):  # weights of NaN are violations, and magnitudes cannot be compared
        fit([report, IterativePrune(ConstantSchedule(0.5, begin=2)), MaskEnforcer()], tmp_path, Nan(tiny), data)
    broken = RunReport(tmp_path / "run2", progress=False)
    one_shot = OneShotPrune(Magnitude(NM(2, 4)), progress=False)
    fit([broken, one_shot, MaskEnforcer()], tmp_path, Nan(type(tiny)(tiny.config)), data)
    written = json.loads((tmp_path / "run2/report.json").read_text())
    assert written["perplexity"]["recovered"] is None
    assert (tmp_path / "run2/report.png").stat().st_size > 10_000


def test_an_interrupted_save_is_taken_back(tmp_path, tiny):
    masks = MaskSet.from_nonzero({})
    save_sparse_model(tiny, masks, tmp_path)
    (tmp_path / "model").rename(tmp_path / "model.old")  # killed between the two renames
    broken = type(tiny)(tiny.config)
    broken.save_pretrained = None
    with pytest.raises(TypeError):
        save_sparse_model(broken, masks, tmp_path)
    assert (tmp_path / "model/model.safetensors").exists()


def test_the_monitor_sees_violations_and_logs_every_layer(tmp_path, tiny, data, monkeypatch):
    enforcer, logged = MaskEnforcer(), []

    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.model.model.layers[0].mlp.up_proj.weight.data[:2] = 1.0

    class Log(CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics))

    monitor = SparsityMonitor(tmp_path, every_n_steps=1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[OneShotPrune(Magnitude(NM(2, 4)), progress=False), enforcer, Spoil(), monitor],
        logger=Log(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match=r"32 pruned weights are not zero in the module .* the callbacks Spoil, or a"):
        trainer.fit(CausalLM(tiny), datamodule=data)
    name = "model.layers.0.mlp.up_proj.weight"
    counts = [metrics[f"violations/{name}"] for _, metrics in logged if f"violations/{name}" in metrics]
    assert counts == [0, 32, 32]  # two rows of 32, half of them pruned
    assert monitor.history[0]["sparsity"][name] == 0.5
    assert monitor.history[1]["sparsity"][name] < 0.5
    with pytest.raises(ValueError, match="weights that MaskEnforcer holds at zero, and there is none"):
        fit([SparsityMonitor()], tmp_path, CausalLM(tiny), data)
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        SparsityMonitor(every_n_steps=0)


def test_a_model_that_cannot_be_saved_is_refused_before_pruning(tmp_path, data):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))])
            self.head = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))

        def configure_optimizers(self):
            return None

        def training_step(self, batch, batch_idx):
            return None

    one_shot = OneShotPrune(Magnitude(NM(2, 4)), targets="layers*", dirpath=tmp_path / "out", progress=False)
    module = Plain()
    with (
        pytest.warns(UserWarning, match="will not last"),
        pytest.raises(ValueError, match="could not be loaded from its files, because of layer head: its weight is"),
    ):
        fit([one_shot], tmp_path, module, data)
    assert module.layers[0][0].weight.count_nonzero() == 16
