"""Permuting, rounding and shrinking as callbacks of real fits."""

import json
from types import SimpleNamespace

import pytest
import torch
from fits import optimizer, trainer_of
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM

from prune_callbacks import (
    NM,
    CausalLM,
    Columns,
    Grid,
    LoRARecovery,
    MaskEnforcer,
    OneShotPrune,
    PermuteChannels,
    QuantizeWeights,
    RunReport,
    SemiStructuredConvert,
    ShrinkModel,
    SparseGPTQ,
    Structured,
    TokenDataModule,
    Unstructured,
    Wanda,
    load_compressed,
    save_compressed,
)
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.tasks import byte_tokenizer, tiny_llama


@pytest.fixture
def data(tmp_path):
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times.\n" * 200)
    return TokenDataModule.from_text_file(
        byte_tokenizer(), str(tmp_path / "a.txt"), seq_len=32, calibration_windows=8, batch_size=4
    )


def fit(data, tmp_path, *callbacks, steps=3):
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer=optimizer)
    trainer = trainer_of(list(callbacks), tmp_path, max_steps=steps, accumulate_grad_batches=1)
    trainer.fit(module, datamodule=data)
    return module.model


@pytest.mark.parametrize("pruner", [Wanda(NM(2, 4)), Wanda(Unstructured(0.5))], ids=str)
def test_weights_are_rounded_after_training_and_zeros_held(data, tmp_path, pruner):
    out = tmp_path / "run"
    prune = OneShotPrune(pruner, progress=False)
    quantize = QuantizeWeights(out, Grid(4, 16), progress=False)
    report = RunReport(out, progress=False)
    model = fit(data, tmp_path, report, prune, MaskEnforcer(), quantize)
    assert prune.report.masks.violations(model.named_parameters()) == {}
    trained = AutoModelForCausalLM.from_pretrained(out / "model")  # RunReport's, before rounding
    loaded = load_compressed(out / "compressed")
    for name in prune.report.masks:
        rounded = model.get_parameter(name).detach()
        assert torch.equal(loaded.get_parameter(name), rounded)
        assert len(rounded[0, :16].unique()) <= 15
        assert len(trained.get_parameter(name)[0, :16].unique()) > 2
        assert not torch.equal(trained.get_parameter(name), rounded)
    record = json.loads((out / "compression.json").read_text())
    assert record["perplexity"]["seq_len"] == 32
    after = perplexity(model, data.evaluation_windows, progress=False)
    assert record["perplexity"]["after"] == pytest.approx(after, rel=1e-5)
    assert record["perplexity"]["before"] == pytest.approx(report.record["perplexity"]["recovered"], rel=1e-5)
    bits = {NM: 2 + 1 + 1, Unstructured: 2 + 1 + 1}[type(pruner.pattern)]  # codes, places or mask, scales
    assert record["effective_bits"] == pytest.approx(bits, abs=0.01)
    assert record["file_bytes"] == (out / "compressed/compressed.safetensors").stat().st_size


def test_the_smaller_model_is_written_and_the_module_stays(data, tmp_path):
    out = tmp_path / "run"
    prune = OneShotPrune(Structured(Columns(0.5)), progress=False)
    small = ShrinkModel(out)
    model = fit(data, tmp_path, RunReport(out, progress=False), prune, MaskEnforcer(), small)
    assert prune.report.masks.violations(model.named_parameters()) == {}
    loaded = AutoModelForCausalLM.from_pretrained(out / "shrunk")
    assert loaded.config.intermediate_size == model.config.intermediate_size // 2
    windows = data.evaluation_windows
    assert perplexity(loaded, windows, progress=False) == pytest.approx(perplexity(model, windows, progress=False))
    record = json.loads((out / "shrunk.json").read_text())
    assert record["logits_difference"] < 1e-4
    assert record["parameters"] == {
        name: sum(p.numel() for p in m.parameters()) for name, m in (("whole", model), ("shrunk", loaded))
    }
    assert record["file_bytes"] == (out / "shrunk/model.safetensors").stat().st_size
    width = model.config.intermediate_size
    assert record["configuration"]["intermediate_size"] == [width, width // 2]
    assert "num_attention_heads" in record["configuration"]


def test_what_masked_adapters_learned_is_in_the_smaller_model(data, tmp_path):
    out = tmp_path / "run"
    prune = OneShotPrune(Structured(Columns(0.5)), progress=False)
    model = fit(data, tmp_path, prune, ShrinkModel(out), LoRARecovery(masked=True), MaskEnforcer())
    loaded = AutoModelForCausalLM.from_pretrained(out / "shrunk")
    windows = data.evaluation_windows
    assert perplexity(loaded, windows, progress=False) == pytest.approx(perplexity(model, windows, progress=False))


def test_channels_are_permuted_before_pruning_and_training(data, tmp_path):
    out = tmp_path / "run"
    permute = PermuteChannels(NM(2, 4), progress=False)
    prune = OneShotPrune(Wanda(NM(2, 4)), progress=False)
    report = RunReport(out, progress=False)
    model = fit(data, tmp_path, report, permute, prune, MaskEnforcer())
    prune.report.masks.check(NM(2, 4))
    assert prune.report.masks.violations(model.named_parameters()) == {}
    assert all(gain.after > gain.before for gain in permute.permuted.values())
    torch.manual_seed(0)
    plain = OneShotPrune(Wanda(NM(2, 4)), progress=False)
    fit(data, tmp_path, plain, MaskEnforcer())
    assert plain.report.masks != prune.report.masks  # the control


def test_a_resumed_fit_is_not_permuted_again(data, tmp_path):
    def callbacks():
        prune = OneShotPrune(Wanda(NM(2, 4)), progress=False)
        return [PermuteChannels(NM(2, 4), progress=False), prune, MaskEnforcer()]

    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer=optimizer)
    trainer = trainer_of(callbacks(), tmp_path, max_steps=2, accumulate_grad_batches=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer=optimizer)
    resumed = callbacks()
    trainer_of(resumed, tmp_path, max_steps=2, accumulate_grad_batches=1).fit(
        again, datamodule=data, ckpt_path=tmp_path / "a.ckpt"
    )
    assert resumed[0].permuted == {}
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_adapter_beside_the_weights_is_refused_and_a_masked_one_is_not(data, tmp_path):
    prune = [OneShotPrune(Wanda(NM(2, 4)), progress=False)]
    with pytest.raises(ValueError, match=r"LoRARecovery\(masked=False\) keeps its adapter apart"):
        fit(data, tmp_path, *prune, LoRARecovery(masked=False), MaskEnforcer(), QuantizeWeights(tmp_path))
    out = tmp_path / "run"
    model = fit(data, tmp_path, *prune, LoRARecovery(), QuantizeWeights(out, Grid(4, 16), progress=False))
    assert prune[0].report.masks.violations(model.named_parameters()) == {}
    assert torch.equal(load_compressed(out / "compressed").lm_head.weight, model.lm_head.weight)


def test_only_some_layers_of_the_pattern(data, tmp_path):
    prune = OneShotPrune(Wanda(NM(2, 4)), targets="*.mlp.*", progress=False)
    model = fit(data, tmp_path, prune, MaskEnforcer(), QuantizeWeights(tmp_path / "a", Grid(4, 16), progress=False))
    loaded = load_compressed(tmp_path / "a/compressed").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_be_smaller_is_known_before_training(data, tmp_path):
    prune = OneShotPrune(Structured(Columns(0.001)), progress=False)
    steps = []
    with pytest.raises(ValueError, match="no channel and no head is zero as a whole"):
        fit(
            data,
            tmp_path,
            prune,
            MaskEnforcer(),
            LambdaCallback(on_train_batch_start=lambda *_: steps.append(1)),
            ShrinkModel(tmp_path),
        )
    assert not steps


def test_training_what_was_rounded_is_warned_of(data, tmp_path):
    prune = OneShotPrune(SparseGPTQ(NM(2, 4), Grid(4, 16)), progress=False)
    with pytest.warns(UserWarning, match="SparseGPTQ has rounded the weights, and training moves them off their grid"):
        model = fit(data, tmp_path, prune, MaskEnforcer())
    with pytest.raises(ValueError, match="Quantize last"):
        save_compressed(model, prune.report.masks, tmp_path / "a", scales=prune.report.scales, grid=prune.pruner.grid)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda out: [OneShotPrune(Wanda(NM(2, 4))), PermuteChannels(NM(2, 4))], "needs one OneShotPrune after it"),
        (lambda out: [PermuteChannels(NM(2, 4))], r"needs one OneShotPrune after it.*found \['PermuteChannels'\]"),
        (lambda out: [PermuteChannels(Unstructured(0.5))], "PermuteChannels takes an N:M pattern"),
        (
            lambda out: [PermuteChannels(NM(2, 4)), OneShotPrune(Wanda(NM(4, 8)))],
            r"prunes to NM\(n=4, m=8\)",
        ),
        (
            lambda out: [OneShotPrune(Wanda(NM(2, 4))), QuantizeWeights(out)],
            "without MaskEnforcer",
        ),
        (
            lambda out: [OneShotPrune(Wanda(Unstructured(0.5))), SemiStructuredConvert()],
            "prunes to Unstructured",
        ),
        (
            lambda out: [SemiStructuredConvert(), QuantizeWeights(out)],
            "stands before QuantizeWeights",
        ),
        (
            lambda out: [OneShotPrune(Wanda(NM(2, 4))), ShrinkModel(out), MaskEnforcer()],
            r"needs OneShotPrune\(Structured",
        ),
        (lambda out: [OneShotPrune(Structured(Columns(0.5))), ShrinkModel(out)], "without MaskEnforcer"),
        (
            lambda out: [OneShotPrune(Structured(Columns(0.5))), LoRARecovery(), MaskEnforcer(), ShrinkModel(out)],
            "put it before LoRARecovery",
        ),
        (
            lambda out: [OneShotPrune(Structured(Columns(0.5))), ShrinkModel(out), LoRARecovery(masked=False)],
            "keeps its adapter apart",
        ),
    ],
)
def test_wrong_callbacks_are_refused_before_any_work(data, tmp_path, callbacks, message, unchecked):
    with pytest.raises(ValueError, match=message):
        fit(data, tmp_path, *callbacks(tmp_path))


@pytest.mark.parametrize("make", [QuantizeWeights, ShrinkModel])
def test_sharded_strategies_are_refused(make, tmp_path, unchecked):
    callback = make(tmp_path)
    trainer = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy), callbacks=[callback])
    with pytest.raises(ValueError, match=f"{make.__name__} does not work under ModelParallelStrategy"):
        callback.setup(trainer, None, "fit")
