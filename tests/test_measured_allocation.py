"""Sparsity spread by what pruning each block costs, measured right before pruning."""

import json

import pytest
import torch
from fits import trainer_of
from test_reconstruction_fit import Data, Module

from prune_callbacks import (
    ALPS,
    LagrangianAllocation,
    MaskEnforcer,
    MeasuredAllocation,
    OneShotPrune,
    RunReport,
    SparseGPT,
    Unstructured,
    Wanda,
    prune_sequentially,
    write_windows,
)
from prune_callbacks.allocation.lagrangian import importance_of
from prune_callbacks.extend import Allocation
from prune_callbacks.ranks import ALONE
from prune_callbacks.studies import sensitivity
from prune_callbacks.tasks import tiny_llama

GIVEN = torch.randint(3, 200, (8, 24), generator=torch.Generator().manual_seed(1))


def small():
    """Returns a model whose second block matters far more than its first."""
    model = tiny_llama(hidden_size=32, layers=2)
    with torch.no_grad():
        for name, weight in model.model.layers.named_parameters():
            if weight.ndim == 2:
                weight.mul_(12 if name.startswith("1.") else 3)
    return model


# Its own text, of which the dense model is the best model: on random tokens pruning may lower perplexity.
WINDOWS = write_windows(small(), [GIVEN], 8, prompt_tokens=1, progress=False)


def pruned(allocation, pruner=None, model=None, **settings):
    model = model or small()
    report = prune_sequentially(
        model, WINDOWS.split(2), pruner or Wanda(Unstructured(0.5)), allocation=allocation, progress=False, **settings
    )
    return model, report


def test_one_step_equals_measuring_by_hand_into_a_file(tmp_path):
    sensitivity(
        small(),
        WINDOWS.split(2),
        WINDOWS[:3],
        Wanda(Unstructured(0.5)),
        unit="block",
        path=tmp_path / "measured.json",
        progress=False,
    )
    by_file, by_hand = pruned(LagrangianAllocation.from_file(tmp_path / "measured.json"))
    in_one, report = pruned(MeasuredAllocation(windows=3))
    _, unweighted = pruned(LagrangianAllocation())
    assert report.masks == by_hand.masks
    assert all(torch.equal(a, b) for a, b in zip(in_one.parameters(), by_file.parameters(), strict=True))
    assert report.masks != unweighted.masks  # control: the weights change the choice
    assert report.masks != pruned(MeasuredAllocation(windows=1))[1].masks  # and so do the windows


@pytest.mark.parametrize("pruner", [SparseGPT(Unstructured(0.6)), ALPS(Unstructured(0.6))], ids=["SparseGPT", "ALPS"])
def test_other_pruners_get_the_sparsities_that_wanda_measured(pruner):
    _, report = pruned(MeasuredAllocation(), pruner)
    _, wanda = pruned(MeasuredAllocation(), Wanda(Unstructured(0.6)))
    shares = {layer.name: layer.sparsity for layer in report.layers}
    assert len(set(shares.values())) > 1
    for layer in wanda.layers:
        assert shares[layer.name] == pytest.approx(layer.sparsity, abs=0.002), layer.name
    total = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    removed = sum(round(layer.sparsity * layer.shape[0] * layer.shape[1]) for layer in report.layers)
    assert removed == round(0.6 * total)


def test_padding_and_short_windows_measure_nothing():
    mask = torch.ones_like(WINDOWS)
    mask[:5, 20:] = 0  # the first five are shorter than the rest
    batch = {"input_ids": WINDOWS, "attention_mask": mask}
    settings = {"targets": None, "blocks": None, "device": None, "progress": False, "ranks": ALONE}
    found = MeasuredAllocation(windows=3).prepared(small(), [batch], Wanda(Unstructured(0.5)), **settings)
    expected = sensitivity(small(), [batch], WINDOWS[5:8], Wanda(Unstructured(0.5)), unit="block", progress=False)
    ratio = {name: max(expected.increase[name], 1e-12) / expected.proxy[name] for name in expected.increase}
    largest = max(ratio.values())
    assert dict(found.importance) == {name: max(value, largest / 1000) for name, value in ratio.items()}
    # A fourth window is one of the shorter ones, so all are cut to its length.
    four = MeasuredAllocation(windows=4).prepared(small(), [batch], Wanda(Unstructured(0.5)), **settings)
    chosen = WINDOWS[[5, 6, 7, 0], :20]
    expected = sensitivity(small(), [batch], chosen, Wanda(Unstructured(0.5)), unit="block", progress=False)
    largest = max(expected.increase[name] / expected.proxy[name] for name in expected.increase)
    assert max(four.importance.values()) == largest


def test_a_fit_allocates_and_the_report_shows_what_it_took(tmp_path):
    class Sensitive(Module):
        def __init__(self):
            super().__init__()
            self.model = small()

    prune = OneShotPrune(Wanda(Unstructured(0.5)), WINDOWS.split(2), allocation=MeasuredAllocation(windows=3))
    trainer = trainer_of([RunReport(tmp_path / "run"), prune, MaskEnforcer()], tmp_path, max_steps=1)
    trainer.fit(Sensitive(), datamodule=Data())
    assert prune.report.masks == pruned(MeasuredAllocation(windows=3))[1].masks
    record = json.loads((tmp_path / "run/report.json").read_text())
    assert record["allocation"] == "MeasuredAllocation(reach=0.15, points=3, windows=3)"
    assert 0 < record["allocating"]["seconds"] == prune.report.allocation_seconds < prune.report.seconds
    assert "allocation</th>" in (tmp_path / "run/report.html").read_text()


def test_what_cannot_be_measured_is_refused():
    assert isinstance(MeasuredAllocation(), Allocation)
    for count in (0, 2.5):
        with pytest.raises(ValueError, match=f"windows must be a whole number of at least 1, got {count}"):
            MeasuredAllocation(windows=count)
    with pytest.raises(TypeError, match="importance"):
        MeasuredAllocation(importance={"a": 1.0})
    with pytest.raises(TypeError, match="use what its method prepared returns"):
        MeasuredAllocation().choose({}, {}, Unstructured(0.5))
    with pytest.raises(ValueError, match=r"measures one list of blocks, got \['model.layers'\]"):
        pruned(MeasuredAllocation(), blocks=["model.layers"])
    with pytest.raises(ValueError, match="test.encoder has no finite perplexity where b is pruned"):
        importance_of({"a": 1.0, "b": float("nan")}, {"a": 1.0, "b": 1.0}, "test.encoder")
    with pytest.raises(ValueError, match=r"reach must lie in \(0, 1\)"):
        MeasuredAllocation(reach=2)
    plain = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24))
    with pytest.raises(ValueError, match="MeasuredAllocation needs a causal LM of transformers"):
        prune_sequentially(plain, [torch.randn(2, 24)], Wanda(Unstructured(0.5)), allocation=MeasuredAllocation())
    dead = tiny_llama(hidden_size=32, layers=2)
    before = {name: value.clone() for name, value in dead.state_dict().items()}
    with torch.no_grad():
        for block in dead.model.layers:
            for output in (block.self_attn.o_proj, block.mlp.down_proj):
                before_output = output.weight.zero_()
    assert not before_output.any()
    with pytest.raises(ValueError, match="MeasuredAllocation: the model has no layer or block that is sensitive"):
        pruned(MeasuredAllocation(), model=dead)
    kept = {name for name, value in dead.state_dict().items() if torch.equal(value, before[name])}
    assert "model.layers.1.mlp.up_proj.weight" in kept  # nothing was pruned
