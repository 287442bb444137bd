"""Every recipe is composed and instantiated; every file says how it is run."""

from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer

import prune_callbacks
from prune_callbacks import (
    ALPS,
    MRP,
    NM,
    CausalLM,
    Magnitude,
    MaskEnforcer,
    OneShotPrune,
    RunReport,
    SparseGPT,
    Unstructured,
    Wanda,
)
from prune_callbacks.tasks import HubText, tiny_llama

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "recipes/recipe").glob("*.yaml"))
PRUNERS = {
    "magnitude_50": Magnitude(Unstructured(0.5)),
    "wanda_50": Wanda(Unstructured(0.5)),
    "wanda_2of4": Wanda(NM(2, 4)),
    "sparsegpt_50": SparseGPT(Unstructured(0.5)),
    "sparsegpt_2of4": SparseGPT(NM(2, 4)),
    "mrp_50": MRP(Unstructured(0.5)),
    "mrp_2of4": MRP(NM(2, 4)),
    "alps_50": ALPS(Unstructured(0.5)),
    "alps_2of4": ALPS(NM(2, 4)),
}


def compose(*overrides):
    with hydra.initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def small(name, tmp_path):
    """The recipe itself, but for the model: that needs the 500 MB one, which has a test of its own."""
    return compose(f"recipe={name}", "model=tiny_llama", f"output_dir={tmp_path}")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_instantiated(name, tmp_path):
    cfg = small(name, tmp_path)
    assert cfg.name == name
    callbacks = instantiate(cfg.callbacks)
    assert list(callbacks)[:3] == ["report", "one_shot", "enforcer"]
    assert isinstance(callbacks.report, RunReport)
    assert isinstance(callbacks.one_shot, OneShotPrune)
    assert isinstance(callbacks.enforcer, MaskEnforcer)
    assert isinstance(instantiate(cfg.module), CausalLM)
    trainer = instantiate(
        cfg.trainer, callbacks=list(callbacks.values()), logger=list(instantiate(cfg.logger).values())
    )
    assert isinstance(trainer, Trainer)
    if name in PRUNERS:
        assert callbacks.one_shot.pruner == PRUNERS[name]
    data = instantiate(cfg.data)
    data.setup("fit")
    assert data.calibration_windows.shape[1] == data.evaluation_windows.shape[1] == cfg.data.seq_len


def test_the_recipes_of_the_readme_exist():
    assert set(PRUNERS) | {"demo"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_file_begins_with_its_command(name):
    lines = (ROOT / "recipes/recipe" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"  # Hydra reads it only in the first line
    assert lines[1] == f"# python train.py recipe={name}"


@pytest.mark.parametrize("name", ["smollm2_135m", "opt_125m", "llama2_7b", "pretrained"])
def test_pretrained_models_load_from_their_path(name, tmp_path, tokenizer):
    folder = tmp_path / "model"
    tiny_llama(hidden_size=32, layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cfg = compose("recipe=wanda_50", f"model={name}", f"model.path={folder}", f"output_dir={tmp_path}")
    model = instantiate(cfg.module).model
    assert model.dtype == (torch.bfloat16 if name == "llama2_7b" else torch.float32)
    assert instantiate(cfg.callbacks).report.tokenizer("a").input_ids == tokenizer("a").input_ids


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_hub_data_follows_the_papers_protocol(name, tmp_path):
    data = instantiate(compose("recipe=wanda_50", "model=tiny_llama", f"data={name}", f"output_dir={tmp_path}").data)
    evaluation = data.corpora["evaluation"]
    assert evaluation == HubText("Salesforce/wikitext", "wikitext-2-raw-v1", split="test", join="\n\n")
    assert data.seq_len == 2048
    assert data._limits["calibration"] == 128


def test_text_file_data(tmp_path):
    (tmp_path / "a.txt").write_text("some words of text in a line\n" * 2000)
    overrides = ["data=text_file", f"data.path={tmp_path / 'a.txt'}", "data.seq_len=64", "data.train_windows=8"]
    data = instantiate(compose("recipe=wanda_50", "model=tiny_llama", *overrides, f"output_dir={tmp_path}").data)
    data.setup("fit")
    assert data.train_windows.shape == (8, 64)


def test_public_names_are_documented():
    for name in prune_callbacks.__all__:
        assert getattr(prune_callbacks, name).__doc__, name
