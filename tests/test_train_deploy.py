"""The recipes for speed and size from the command line, through every stage on a tiny model."""

import json

import pytest
import torch
from launch import trained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_callbacks import MaskSet, load_compressed, measure_compression

RECIPES = ["deploy_2of4", "deploy_2of4_int8", "sparse_int4", "shrink_25", "permute_2of4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a recipe's run, which is made when it is first asked for."""
    made = {}

    def folder_of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            done = trained(f"recipe={name}", "smoke=true", f"output_dir={made[name]}")
            (made[name] / "output.txt").write_text(done.output)
        return made[name]

    return folder_of


@pytest.mark.parametrize("name", RECIPES)
def test_every_run_leaves_a_report_and_zeros_that_held(run, name):
    report = json.loads((run(name) / "report.json").read_text())
    assert report["violations"] == {}
    masks = MaskSet.load(run(name) / "masks.safetensors")
    assert masks.violations(load_file(run(name) / "model/model.safetensors")) == {}


@pytest.mark.parametrize("name", ["deploy_2of4", "deploy_2of4_int8"])
def test_without_a_gpu_nothing_is_converted_and_a_cpu_was_measured(run, name):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    output = (run(name) / "output.txt").read_text().replace("\n", " ")
    assert "the model stays dense: torch sees no NVIDIA GPU" in output
    record = json.loads((run(name) / "latency.json").read_text())
    assert record["setting"]["kind"] == "cpu"
    assert "this says nothing about GPUs" in record["verdict"][0]
    assert {cell["variant"] for cell in record["cells"]} == {"dense", "CSR"}
    assert (run(name) / "latency.png").stat().st_size > 10_000


def test_sparse_int4_leaves_a_packed_model(run):
    record = json.loads((run("sparse_int4") / "compression.json").read_text())
    assert record["effective_bits"] < 3.3
    assert record["file_bytes"] == measure_compression(run("sparse_int4") / "compressed").file_bytes
    loaded = load_compressed(run("sparse_int4") / "compressed")
    assert MaskSet.load(run("sparse_int4") / "masks.safetensors").violations(loaded.named_parameters()) == {}


def test_shrink_25_leaves_a_smaller_model(run):
    record = json.loads((run("shrink_25") / "shrunk.json").read_text())
    small = AutoModelForCausalLM.from_pretrained(run("shrink_25") / "shrunk")
    assert sum(p.numel() for p in small.parameters()) == record["parameters"]["shrunk"]
    assert set(record["configuration"]) >= {"intermediate_size", "num_attention_heads"}
    assert record["logits_difference"] < 1e-3
    variants = {c["variant"] for c in json.loads((run("shrink_25") / "latency.json").read_text())["cells"]}
    assert variants == {"dense", "CSR", "shrunk"}
