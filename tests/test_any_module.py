"""Every callback on every kind of module, against re-running the whole module in float64."""

import re
from pathlib import Path

import pytest
import torch
from fits import trainer_of
from torch.utils.data import DataLoader
from zoo import KINDS, layers_of, made, matrices, names, rerun

from prune_callbacks import (
    ALPS,
    MRP,
    ConstantSchedule,
    Gram,
    IterativePrune,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    SparseGPT,
    Unstructured,
    Wanda,
)

pytestmark = pytest.mark.filterwarnings("ignore")
HALF = Unstructured(0.5)
PRUNERS = {"Wanda": Wanda(HALF), "SparseGPT": SparseGPT(HALF), "MRP": MRP(HALF), "ALPS": ALPS(HALF)}


def fit(step, batches, callbacks, tmp_path, steps=2):
    trainer = trainer_of(callbacks, tmp_path, max_steps=steps, accumulate_grad_batches=1)
    trainer.fit(step, DataLoader(batches, batch_size=None))
    return trainer


def by_hand(pruner):
    """Prunes a matrix by Wanda, written out, or by a solver on the Gram of the inputs; recurrent ones by magnitude."""

    def prune(weight, inputs):
        if inputs is None or isinstance(pruner, Wanda):
            scores = weight.abs() * (1 if inputs is None else inputs.square().sum(0).sqrt())
            pool = scores.flatten()[None] if inputs is None else scores
            kept = pool.shape[1] - round(0.5 * pool.shape[1])
            best = pool.sort(dim=1, descending=True, stable=True).indices[:, :kept]
            keep = torch.zeros_like(pool, dtype=torch.bool).scatter_(1, best, True).view(weight.shape)
            return weight * keep, keep
        gram = Gram(inputs.shape[1])
        gram.matrix, gram.tokens = inputs.T @ inputs, len(inputs)
        pruned = pruner.prune(weight, gram)
        return pruned.weight, pruned.keep

    return prune


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_shot_equals_rerunning_the_whole_module(kind, name, tmp_path):
    step, batches, stages, dense = made(kind)
    expected = names(step, rerun(step, batches, stages, by_hand(PRUNERS[name]))[1])
    prune = OneShotPrune(PRUNERS[name], progress=False)
    fit(step, batches, [prune, MaskEnforcer()], tmp_path)
    assert set(prune.report.masks) == set(expected)
    for parameter, keep in expected.items():
        assert torch.equal(prune.report.masks[parameter], keep), parameter
    assert prune.report.masks.violations(step.named_parameters()) == {}
    assert names(step, dict.fromkeys(dense)).keys() <= prune.report.skipped.keys()
    assert all(named in prune.report.by_magnitude for named in expected if ".weight_ih" in named)


def weights_of(step, stages):
    """All weights that are pruned by default, by the name of the parameter."""
    layers = [layer for stage in stages for layer in layers_of(step.model, stage).items()]
    held = {parameter for name, layer in layers for parameter, _, _ in matrices(name, layer)}
    return {name: step.model.get_parameter(name) for name in held}


@pytest.mark.parametrize("kind", KINDS)
def test_iterative_pruning_removes_the_smallest_of_all_layers(kind, tmp_path):
    step, batches, stages, _ = made(kind)
    weights = weights_of(step, stages)
    every = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    least = every.sort().values[round(0.5 * len(every))]
    expected = names(step, {name: weight.detach().abs() >= least for name, weight in weights.items()})
    prune = IterativePrune(ConstantSchedule(0.5))
    fit(step, batches, [prune, MaskEnforcer()], tmp_path)
    assert set(prune.masks) == set(expected)
    for name, keep in expected.items():
        assert torch.equal(prune.masks[name], keep), name
    assert prune.masks.violations(step.named_parameters()) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_enforcer_finds_and_holds_the_zeros(kind, tmp_path):
    for enforced in (True, False):
        step, batches, stages, _ = made(kind)
        weights = weights_of(step, stages)
        keep = MaskSet(names(step, {name: torch.rand(weight.shape) < 0.5 for name, weight in weights.items()}))
        keep.apply_(step.named_parameters())
        enforcer = MaskEnforcer()
        fit(step, batches, [enforcer] if enforced else [], tmp_path)
        if enforced:
            assert enforcer.masks == keep
            assert keep.violations(step.named_parameters()) == {}
        else:  # the control
            assert keep.violations(step.named_parameters()).keys() == set(keep)


def test_the_readme_s_table_is_that_of_the_page():
    """`python tests/every_module.py` writes one and prints the other; a kind or a column more needs a new run."""
    root = Path(__file__).parents[1]
    page, readme = ((root / name).read_text().splitlines() for name in ("docs/modules.md", "README.md"))
    rows = [line for line in page if line.startswith("|")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == list(KINDS)
    assert rows[0].split(" | ")[1:-1] == [*PRUNERS, "IterativePrune", "MaskEnforcer"]
    assert all(row in readme for row in rows)


def test_the_readme_s_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    readme = (Path(__file__).parents[1] / "README.md").read_text().split("### Any module\n")[1]
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], {"__name__": "example"})
    assert "0.5 {'net.8.weight': 'it is the last layer that is called, which makes" in capsys.readouterr().out
