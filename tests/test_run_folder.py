"""The folder that a run of train.py leaves, by the README's command in a fresh interpreter."""

import json
import sys

import pytest
from launch import cold, good, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_callbacks import MaskSet
from prune_callbacks.storage.run_record import RunRecord


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = good(cold(sys.executable, "train.py", "recipe=sparsegpt_50", "smoke=true", f"output_dir={folder}"))
    return folder, done


def test_a_run_leaves_its_folder(finished):
    folder, done = finished
    report = json.loads((folder / "report.json").read_text())
    assert {"report.json", "masks.safetensors", "model", "report.png", "config.yaml"} <= {
        p.name for p in folder.iterdir()
    }
    assert report["recipe"] == "sparsegpt_50"
    assert report["model"] == "tiny_llama"
    assert report["violations"] == {}
    measured = report["perplexity"]
    assert measured["seq_len"] == 64
    assert measured["dataset"] == "Python language reference (evaluation)"
    assert measured["recovered"] < measured["pruned"]
    assert report["sparsity"]["target"] == report["sparsity"]["achieved"] == 0.5
    assert len(report["sparsity"]["layers"]) == 4 * 7
    assert set(report["seconds"]) == {"prune", "recover", "evaluate"}
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert report["peak_memory_bytes"] > 1e8
    assert report["versions"]["torch"]
    assert "pruning model.layers" in done.stdout
    assert "recovered" in done.stdout


def test_the_saved_model_is_plain_and_sparse(finished):
    folder, _ = finished
    masks = MaskSet.load(folder / "masks.safetensors")
    assert masks.violations(load_file(folder / "model/model.safetensors")) == {}
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert masks.violations(model.named_parameters()) == {}
    assert masks.sparsity() == 0.5
    assert AutoTokenizer.from_pretrained(folder / "model")("ab").input_ids == [100, 101, 1]
    assert "sparsity" not in (folder / "model/config.json").read_text()


def test_a_folder_with_a_run_is_refused(finished):
    folder, _ = finished
    before = (folder / "report.json").read_text()
    again = train("recipe=wanda_50", "smoke=true", f"output_dir={folder}")
    assert again.returncode == 1
    assert "already holds a run (report.json, masks.safetensors, model)" in again.stderr
    assert (folder / "report.json").read_text() == before


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ([], "not the record of a run"),
        ({"perplexity": [1]}, r"its perplexity is \[1\]"),
        ({"sparsity": [1]}, r"its sparsity is \[1\]"),
        ({"metrics": [1]}, r"its metrics is \[1\]"),
        ({"schema": "1"}, "schema '1', which is no whole number"),
        ({"schema": 99}, "schema 99, and this version .* reads up to 1; install a later one"),
    ],
)
def test_what_is_no_record_is_refused(record, text):
    with pytest.raises(ValueError, match=text):
        RunRecord.from_json(record)


def test_a_record_reads_what_it_writes_and_as_much_as_there_is():
    whole = RunRecord(recipe="a", violations={"w": 1}, rounds=[{"step": 1}])
    assert RunRecord.from_json(whole.to_json()) == whole
    assert json.loads(json.dumps(whole.to_json())) == whole.to_json()
    odd = {"perplexity": {"dense": 1.0, "stderr": 0.1}, "sparsity": {"layers": None}, "schema": None, "mine": 3}
    read = RunRecord.from_json(odd)
    assert (read.perplexity.dense, read.sparsity.layers, read.schema) == (1.0, {}, 1)
