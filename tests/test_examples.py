"""The scripts in examples/, with few steps: what they prune, and that the zeros hold. All of their steps are slow."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from launch import cold, good
from tiers import slow
from torch import nn

from prune_callbacks import NM, MaskSet
from prune_callbacks.storage.run_record import read_record

EXAMPLES = Path(__file__).parents[1] / "examples"
STACKS = {
    "vit_2of4": {"vit.layers": 3 * 6},
    "bert_2of4": {"bert.encoder.layer": 2 * 6},
    "t5_2of4": {"encoder.block": 2 * 6, "decoder.block": 2 * 10},
}
"""The stacks of blocks that each prunes, and how many linear layers are in them."""

STEPS = {"vit_2of4": 60, "bert_2of4": 30, "t5_2of4": 50}

DENSE = {
    "vit_2of4": ["classifier.weight"],
    "bert_2of4": ["bert.pooler.dense.weight", "classifier.weight"],
    "t5_2of4": ["shared.weight"],
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(STACKS)
    readme = (EXAMPLES / "README.md").read_text()
    assert [name for name in STACKS if f"python examples/{name}.py" not in readme] == []


@pytest.mark.parametrize("name", ["vit_2of4", slow("bert_2of4"), slow("t5_2of4")])
def test_every_stack_is_2of4_and_stays_so(name, tmp_path, capsys):
    module, record = load(name).main(tmp_path / "run", steps=STEPS[name], recovery_steps=10)
    masks = MaskSet.load(tmp_path / "run/masks.safetensors")
    layers = dict(module.model.named_modules())
    for stack, count in STACKS[name].items():
        found = [mask for mask in masks if mask.startswith(f"{stack}.")]
        assert len(found) == count
        assert all(isinstance(layers[mask.removesuffix(".weight")], nn.Linear) for mask in found)
    assert len(masks) == sum(STACKS[name].values())
    masks.check(NM(2, 4))
    weights = dict(module.model.named_parameters())
    assert masks.violations(weights) == record.violations == {}
    for mask in masks:  # counted in the weights themselves
        assert weights[mask].reshape(-1, 4).count_nonzero(1).unique().tolist() == [2]
        assert record.sparsity.layers[mask] == 0.5
    assert all(weights[dense].count_nonzero() == weights[dense].numel() for dense in DENSE[name])
    accuracy = record.metrics["val_accuracy"]
    assert set(accuracy) == {"dense", "pruned", "recovered"}
    chance = {"vit_2of4": 0.1, "bert_2of4": 0.125, "t5_2of4": 1 / 26}[name]
    assert accuracy["recovered"] > 1.3 * chance
    printed = capsys.readouterr().out
    assert re.search(r"val_accuracy +│ +[\d.]+ +│ +[\d.]+ +│ +[\d.]+", printed)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_all_of_it_recovers_what_pruning_cost(name, tmp_path):
    good(cold(sys.executable, EXAMPLES / f"{name}.py", tmp_path / "run", timeout=600))
    accuracy = read_record(tmp_path / "run").metrics["val_accuracy"]
    assert accuracy["dense"] > {"vit_2of4": 0.9, "bert_2of4": 0.7, "t5_2of4": 0.9}[name]
    assert accuracy["recovered"] > accuracy["dense"] - 0.02


def test_padding_does_not_count_where_bert_is_calibrated():
    """Batches are padded: the premise of the example's comment, which test_batches holds for padding."""
    train_loader, test_loader, vocabulary = load("bert_2of4").loaders()
    batch = next(iter(test_loader))
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
    assert 0 < batch["attention_mask"].float().mean() < 1
    assert batch["input_ids"].max() < vocabulary
    assert set(batch["labels"].tolist()) <= set(range(8))
    assert len(train_loader.dataset) == pytest.approx(3 * len(test_loader.dataset), abs=3)


def test_words_of_t5_are_backwards_and_those_held_out_are_not_trained_on():
    train_loader, test_loader = load("t5_2of4").loaders()
    batch = next(iter(test_loader))
    assert torch.equal(batch["labels"].flip(1), batch["input_ids"])
    trained, held_out = (
        {tuple(row["input_ids"].tolist()) for row in loader.dataset} for loader in (train_loader, test_loader)
    )
    assert not trained & held_out
    assert len(trained) > 1000
