"""Calibration windows that a model writes itself: their distribution, their beginnings, and OneShotPrune."""

import json

import pytest
import torch
from fits import trainer_of
from test_reconstruction_fit import Data, Module
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from prune_callbacks import (
    NM,
    BlockReconstruction,
    Magnitude,
    MaskEnforcer,
    OneShotPrune,
    RunReport,
    SparseGPT,
    prune_sequentially,
    write_windows,
)
from prune_callbacks.tasks import tiny_llama

GIVEN = torch.randint(3, 200, (6, 24), generator=torch.Generator().manual_seed(0))
CALIBRATION = torch.randint(3, 200, (8, 2, 24), generator=torch.Generator().manual_seed(1))


def small():
    return tiny_llama(hidden_size=32, layers=2)


def written(model=None, batches=(GIVEN,), count=5, **settings):
    return write_windows(model or small(), batches, count, progress=False, **settings)


def sharpened():
    """Returns a model whose probabilities are far from equal."""
    model = small()
    with torch.no_grad():
        model.model.norm.weight.mul_(8)
    return model


@pytest.mark.parametrize("cut", [False, True], ids=["its own", "control: the 20 likeliest"])
def test_tokens_have_the_models_own_distribution(cut, monkeypatch):
    """Compares counts of the first two drawn tokens with probabilities in float64, by chi-square over 200 cells."""
    model = sharpened()
    # Settings that would change every draw, if they were used.
    model.generation_config = GenerationConfig(temperature=0.3, top_p=0.5, repetition_penalty=3.0, do_sample=True)
    if cut:
        generate = model.generate
        monkeypatch.setattr(model, "generate", lambda *a, **k: generate(*a, **(k | {"top_k": 20})))
    drawn = written(model, [GIVEN[:1, :18]], 4000, prompt_tokens=16, batch_size=2000)
    with torch.no_grad():
        logits = model.double()(drawn[:, :17]).logits
    statistic, cells = 0.0, 0
    first = logits[0, 15].softmax(-1)  # of the 17th token, the same for all
    counts = drawn[:, 16].bincount(minlength=259)
    likely = first * len(drawn) >= 5
    statistic += float(((counts - first * len(drawn))[likely] ** 2 / (first * len(drawn))[likely]).sum())
    cells += int(likely.sum())
    # Of the 18th, after whatever came: expected counts are sums of probabilities, with a smaller variance than Poisson.
    expected = logits[:, 16].softmax(-1).sum(0)
    counts = drawn[:, 17].bincount(minlength=259)
    likely = expected >= 5
    statistic += float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    cells += int(likely.sum())
    assert cells > 200
    below = statistic < cells + 5 * (2 * cells) ** 0.5
    assert below is not cut, (statistic, cells)


def test_windows_begin_as_the_given_ones_in_turn_and_are_as_long_as_the_longest():
    batches = [GIVEN[:2, :20], {"input_ids": GIVEN[2:4]}, (GIVEN[4:],)]
    drawn = written(batches=batches, count=8, prompt_tokens=7, batch_size=3)
    assert drawn.shape == (8, 24)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn[:6, :7], GIVEN[:, :7])
    assert torch.equal(drawn[6:, :7], GIVEN[:2, :7])
    assert not torch.equal(drawn[6], drawn[0])  # the same beginning, another draw


def test_padding_is_no_beginning_and_short_windows_begin_none():
    mask = torch.ones(6, 24, dtype=torch.long)
    mask[0, :10], mask[1, 12:], mask[2, 4:] = 0, 0, 0
    drawn = written(batches=[{"input_ids": GIVEN, "attention_mask": mask}], prompt_tokens=8)
    assert torch.equal(drawn[:, :8], torch.stack([GIVEN[0, 10:18], *GIVEN[[1, 3, 4, 5], :8]]))


def test_text_goes_on_behind_an_end_of_text():
    model = sharpened()
    with torch.no_grad():  # makes token 1, the end of text, likely everywhere
        model.model.embed_tokens.weight[1] = model.model.embed_tokens.weight[5]
    drawn = written(model, count=400, prompt_tokens=4)[:, 4:]
    ends = (drawn == 1).nonzero()
    assert len(ends) > 20
    behind = [drawn[row, place + 1 :] for row, place in ends.tolist() if place < 19]
    assert sum(int((rest != 0).sum()) for rest in behind) > 0.95 * sum(map(len, behind))  # 0 is padding


def test_the_seed_decides_and_nothing_else_changes():
    model = small().train()
    settings, state = model.generation_config, torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = written(model)
    torch.manual_seed(7)
    moved = torch.get_rng_state()
    assert torch.equal(one, written(model))
    assert torch.equal(torch.get_rng_state(), moved)
    assert not torch.equal(one, written(model, seed=1))
    assert not torch.equal(state, moved)  # control: other states were told apart
    assert model.generation_config is settings
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(one, written(Module_of(model)))  # a module that holds it


def Module_of(model):  # noqa: N802 (named like the class)
    module = Module()
    module.model = model
    return module


def t5():
    config = T5Config(vocab_size=259, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


def vit():
    return ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))


@pytest.mark.parametrize(
    ("model", "batches", "settings", "error"),
    [
        (
            lambda: torch.nn.Linear(4, 4),
            [GIVEN],
            {},
            "write_windows needs a causal LM of transformers, .*; got Linear",
        ),
        (t5, [GIVEN], {}, "got T5ForConditionalGeneration"),
        (vit, [GIVEN], {}, "got ViTModel"),
        (
            small,
            [{"inputs_embeds": torch.zeros(1, 24, 32)}],
            {},
            r"token ids alone; one holds \['inputs_embeds'\]",
        ),
        (small, [GIVEN], {"prompt_tokens": 24}, "more than prompt_tokens=24 tokens; the longest of 6 has 24"),
        (small, [], {}, "the longest of 0 has 0"),
        (small, [GIVEN], {"count": 0}, "count must be a whole number of at least 1, got 0"),
        (small, [GIVEN], {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (small, [GIVEN + 200], {}, "embeddings for 0 to 258"),
    ],
)
def test_what_cannot_be_written_is_refused(model, batches, settings, error):
    with pytest.raises(ValueError, match=error):
        written(model(), batches, **settings)


def fit(tmp_path, further=(), reconstruction=None, **settings):
    module = Module()
    prune = OneShotPrune(SparseGPT(NM(2, 4)), list(CALIBRATION), reconstruction=reconstruction, written_windows=5)
    trainer = trainer_of([*further, prune, MaskEnforcer()], tmp_path, max_steps=0, **settings)
    trainer.fit(module, datamodule=Data())
    return module.model, prune


def test_one_shot_prune_calibrates_on_given_and_written_windows(tmp_path):
    setting = BlockReconstruction(passes=1)
    model, prune = fit(tmp_path, [RunReport(tmp_path / "run")], setting)
    expected, control = small(), small()
    further = write_windows(expected, CALIBRATION, 5, progress=False).split(2)
    for other, batches in ((expected, [*CALIBRATION, *further]), (control, list(CALIBRATION))):
        report = prune_sequentially(other, batches, SparseGPT(NM(2, 4)), reconstruction=setting, progress=False)
    assert prune.report.tokens == (16 + 5) * 24 == report.tokens + 5 * 24
    pairs = [(own, other) for own, other in zip(model.parameters(), expected.parameters(), strict=True)]
    assert all(torch.equal(own, other) for own, other in pairs)
    assert not all(torch.equal(own, other) for own, other in zip(model.parameters(), control.parameters(), strict=True))
    record = json.loads((tmp_path / "run/report.json").read_text())
    assert record["writing"] == {"windows": 5, "seconds": prune.report.writing_seconds}
    assert 0 < prune.report.writing_seconds < 60
    assert "5 more calibration windows" in (tmp_path / "run/report.html").read_text()


def test_a_trial_run_writes_no_window(tmp_path):
    _, prune = fit(tmp_path, fast_dev_run=True)
    assert prune.report.tokens == 2 * 24
    assert prune.report.writing_seconds == 0


def test_windows_that_nothing_would_use_are_refused(tmp_path):
    with pytest.raises(ValueError, match="written_windows=4, but there is nothing to calibrate"):
        OneShotPrune(Magnitude(NM(2, 4)), written_windows=4)
    with pytest.raises(ValueError, match="forward= runs batches of its own kind"):
        OneShotPrune(SparseGPT(NM(2, 4)), written_windows=4, forward=lambda module, batch: None)
    with pytest.raises(ValueError, match="must be a whole number, got -1"):
        OneShotPrune(SparseGPT(NM(2, 4)), written_windows=-1)
    module = Module()
    module.model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    prune = OneShotPrune(SparseGPT(NM(2, 4)), [torch.randn(4, 16)], written_windows=4)
    with pytest.raises(ValueError, match=r"OneShotPrune\(written_windows=...\) needs a causal LM"):
        trainer_of([prune, MaskEnforcer()], tmp_path).fit(module, datamodule=Data())
    OneShotPrune(Magnitude(NM(2, 4)), written_windows=4, reconstruction=BlockReconstruction())  # which is calibrated
