"""Checkpoints of every family pruned one block at a time, as `save_pretrained` writes them: experts one by one."""

import json

import pytest
import torch
from families import FAMILIES, MIXTURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prune_callbacks import NM, MaskSet, SparseGPT, Unstructured, Wanda, prune_checkpoint, prune_sequentially

PRUNER = SparseGPT(Unstructured(0.5))
EXPERTS_APART = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3"]

pytestmark = pytest.mark.filterwarnings("ignore:.*(calibration tokens|stay dense)")


@pytest.fixture
def batches():
    return list(torch.randint(3, 60, (6, 24)).split(2))


def build(folder, family, dtype=torch.float32, **settings):
    model = AutoModelForCausalLM.from_config((FAMILIES | MIXTURES)[family](), dtype=dtype)
    model.save_pretrained(folder, **settings)
    return folder


def tensors(folder):
    """The name, dtype and shape of every tensor in the files of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found |= {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    return found


def both_ways(tmp_path, source, batches, pruner=PRUNER, **settings):
    """The folders that pruning the loaded model and streaming make, after a look at what was read from them."""
    model = AutoModelForCausalLM.from_pretrained(source)
    report = prune_sequentially(model, batches, pruner, progress=False)
    model.save_pretrained(tmp_path / "in_memory", **settings)
    prune_checkpoint(source, tmp_path / "target", pruner, batches, progress=False)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "target/model")
    assert streamed.dtype == model.dtype
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in streamed.state_dict().items())
    assert MaskSet.load(tmp_path / "target/masks.safetensors") == report.masks
    return tmp_path / "in_memory", tmp_path / "target/model"


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_streaming_writes_what_pruning_in_memory_saves(tmp_path, batches, family):
    source = build(tmp_path / "source", family)
    if family in EXPERTS_APART:
        assert any(".experts.0." in name for name in tensors(source))
    in_memory, streamed = both_ways(tmp_path, source, batches)
    assert tensors(streamed) == tensors(in_memory)
    index = json.loads((streamed / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(streamed).keys()


@pytest.mark.parametrize("family", ["deepseek-v3", "mamba", "gpt-oss", "falcon-40b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_stays_in_32_bits_is_what_from_pretrained_leaves_there(tmp_path, batches, family, dtype):
    source = build(tmp_path / "source", family, dtype)
    in_memory, streamed = both_ways(tmp_path, source, batches, Wanda(NM(2, 4)))
    assert tensors(streamed) == tensors(in_memory)


@pytest.mark.parametrize("family", EXPERTS_APART)
def test_a_checkpoint_keeps_the_form_that_it_has(tmp_path, batches, family):
    """Experts that lie in one tensor stay there; in 16 bits, and with 1:4."""
    source = build(tmp_path / "source", family, torch.bfloat16, save_original_format=False)
    assert not any(".experts.0." in name for name in tensors(source))
    in_memory, streamed = both_ways(tmp_path, source, batches, Wanda(NM(1, 4)), save_original_format=False)
    assert tensors(streamed) == tensors(in_memory)
    assert tensors(streamed).keys() == tensors(source).keys()


def test_experts_are_made_in_the_dtype_of_the_model(tmp_path, batches):
    source = build(tmp_path / "source", "mixtral")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    in_memory, streamed = both_ways(tmp_path, source, batches)
    assert tensors(streamed) == tensors(in_memory)
    assert {dtype for dtype, _ in tensors(streamed).values()} == {"BF16"}


def changed(source, change):
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda w: w.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"),
            r"model.layers.1.mlp.experts.down_proj is made of 3 tensors .* of shape \(3, 16, 32\), and by config.json",
        ),
        (
            lambda w: w.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"),
            "model.layers.1.mlp.experts.gate_up_proj is made of 7 tensors of .*, which do not fit together",
        ),
        (
            lambda w: w.update({"model.layers.0.block_sparse_moe.experts.0.w3.weight": torch.zeros(32, 15)}),
            "model.layers.0.mlp.experts.gate_up_proj is made of 8 tensors of .*, which do not fit together",
        ),
        (
            lambda w: w.update({"model.layers.0.block_sparse_moe.experts.3.w1.weight": torch.zeros(32, 16).char()}),
            "experts.3.w1.weight in .* is I8; quantized weights cannot be pruned",
        ),
    ],
    ids=["an expert", "half an expert", "shape", "integers"],
)
def test_experts_that_do_not_fit_are_refused(tmp_path, batches, change, match):
    source = build(tmp_path / "source", "mixtral")
    changed(source, change)
    with pytest.raises(ValueError, match=match):
        prune_checkpoint(source, tmp_path / "target", PRUNER, batches, progress=False)
    assert not (tmp_path / "target").exists()
