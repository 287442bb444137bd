"""Block reconstruction at fit start: in OneShotPrune, its report, trial runs, and resumed fits."""

import json

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint

from prune_callbacks import (
    NM,
    BlockReconstruction,
    Magnitude,
    MaskEnforcer,
    OneShotPrune,
    PruneReport,
    RunReport,
    SparseGPT,
    prune_sequentially,
)
from prune_callbacks.tasks import CausalLM, tiny_llama

FEW = BlockReconstruction(passes=2, learning_rate=0.005, held_out=0.25)


def windows(count=8, seed=1):
    return torch.randint(3, 200, (count, 2, 16), generator=torch.Generator().manual_seed(seed))


class Data(LightningDataModule):
    evaluation_title = "windows"

    def setup(self, stage):
        self.evaluation_windows = windows()[:2].flatten(0, 1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(windows(), batch_size=None)


class Module(CausalLM):
    def __init__(self):
        super().__init__(tiny_llama(hidden_size=32, layers=2))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)


class Watch(MaskEnforcer):
    """Keeps the weights of the first step."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.begin = {name: value.detach().clone() for name, value in pl_module.model.named_parameters()}


def fit(tmp_path, reconstruction=FEW, pruner=None, further=(), ckpt_path=None, **settings):
    module, prune = (
        Module(),
        OneShotPrune(pruner or SparseGPT(NM(2, 4)), list(windows()), reconstruction=reconstruction),
    )
    watch = Watch()
    trainer = trainer_of([*further, prune, watch], tmp_path, **({"max_steps": 4} | settings))
    trainer.fit(module, datamodule=Data(), ckpt_path=ckpt_path)
    return module, prune, watch


@pytest.mark.parametrize("pruner", [SparseGPT(NM(2, 4)), Magnitude(NM(2, 4))], ids=["SparseGPT", "Magnitude"])
def test_a_fit_begins_with_the_reconstructed_model_and_its_zeros_hold(tmp_path, pruner):
    module, prune, watch = fit(tmp_path, pruner=pruner)
    expected = tiny_llama(hidden_size=32, layers=2)
    prune_sequentially(expected, list(windows()), pruner, reconstruction=FEW, progress=False)
    control = tiny_llama(hidden_size=32, layers=2)
    prune_sequentially(control, list(windows()), pruner, progress=False)
    for name, value in expected.named_parameters():
        assert torch.equal(watch.begin[name], value), name
    assert not torch.equal(watch.begin["model.norm.weight"] * 0, watch.begin["model.norm.weight"])
    assert any(not torch.equal(watch.begin[name], value) for name, value in control.named_parameters())
    assert prune.report.masks.violations(module.model.named_parameters()) == {}
    assert [block.name for block in prune.report.reconstruction] == ["model.layers.0", "model.layers.1"]


def test_the_report_has_every_block_and_the_page_shows_them(tmp_path):
    _, prune, _ = fit(tmp_path, further=[RunReport(tmp_path / "run")])
    record = json.loads((tmp_path / "run/report.json").read_text())["reconstruction"]
    assert record["settings"] == repr(FEW)
    assert [block["after"] for block in record["blocks"]] == [block.after for block in prune.report.reconstruction]
    assert record["seconds"] == pytest.approx(sum(block.seconds for block in prune.report.reconstruction))
    assert (record["put_back"], record["untrained"]) == ([], {})
    page = (tmp_path / "run/report.html").read_text()
    assert "Block reconstruction" in page
    assert "model.layers.1" in page
    fit(tmp_path, None, further=[RunReport(tmp_path / "without")])
    assert json.loads((tmp_path / "without/report.json").read_text())["reconstruction"] == {}
    assert "Block reconstruction" not in (tmp_path / "without/report.html").read_text()


def test_a_resumed_fit_does_not_reconstruct_again(tmp_path, monkeypatch):
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    _, prune, _ = fit(tmp_path, further=[checkpoints], enable_checkpointing=True)
    path = next((tmp_path / "checkpoints").glob("*step=2.ckpt"))
    monkeypatch.setattr("prune_callbacks.callbacks.prune_module.prune_sequentially", None)
    module, again, _ = fit(tmp_path, ckpt_path=path, max_steps=6)
    assert again.report.reconstruction == prune.report.reconstruction
    assert again.report.masks.violations(module.model.named_parameters()) == {}
    assert PruneReport.from_state_dict(prune.report.state_dict()).reconstruction == prune.report.reconstruction


def test_a_trial_run_makes_one_pass_over_one_batch(tmp_path):
    _, prune, _ = fit(tmp_path, BlockReconstruction(passes=50, held_out=0.5), fast_dev_run=True)
    assert {block.best_pass for block in prune.report.reconstruction} <= {0, 1}


def test_settings_that_do_not_fit_fail_before_the_fit(tmp_path):
    with pytest.raises(ValueError, match="none is left to train on"):
        fit(tmp_path, BlockReconstruction(held_out=0.99))
    with pytest.raises(ValueError, match="reconstruction must be a BlockReconstruction, got 3"):
        OneShotPrune(SparseGPT(NM(2, 4)), reconstruction=3)
