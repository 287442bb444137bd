"""The command line, in real processes: a run, bad input, a failure after pruning, a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_callbacks import MaskSet

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def command(*arguments):
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = run("recipe=sparsegpt_50", "smoke=true", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
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
    again = run("recipe=wanda_50", "smoke=true", f"output_dir={folder}")
    assert again.returncode == 1
    assert "already holds a run (report.json, masks.safetensors, model)" in again.stderr
    assert (folder / "report.json").read_text() == before


def test_an_unknown_recipe_lists_those_there_are():
    done = run("recipe=wanda_51")
    assert done.returncode == 1
    assert "Could not find 'recipe/wanda_51'" in done.stderr
    assert "wanda_50" in done.stderr


def test_a_run_that_fails_after_pruning_has_saved_the_pruned_model(tmp_path):
    done = run("recipe=wanda_50", "smoke=true", f"output_dir={tmp_path}", "optimizer.lr=-1")
    assert done.returncode == 1
    assert "Invalid learning rate" in done.stderr
    masks = MaskSet.load(tmp_path / "masks.safetensors")
    assert masks.sparsity() == 0.5
    assert masks.violations(load_file(tmp_path / "model/model.safetensors")) == {}


def test_a_killed_run_resumes_to_the_same_masks(tmp_path):
    folder = tmp_path / "run"
    arguments = ["recipe=wanda_50", "smoke=true", f"output_dir={folder}", "data.train_windows=2000"]
    arguments += ["callbacks.checkpoint.every_n_train_steps=5"]
    process = subprocess.Popen(
        command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while time.time() < deadline and len(list(folder.glob("checkpoints/*.ckpt"))) == 0:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = json.loads((folder / "report.json").read_text())
    assert report["stage"] == "pruned"
    assert report["perplexity"]["pruned"] > 0
    assert report["perplexity"]["recovered"] is None
    masks = MaskSet.load(folder / "masks.safetensors")
    assert masks.violations(load_file(folder / "model/model.safetensors")) == {}
    checkpoint = shutil.copy(max(folder.glob("checkpoints/*.ckpt"), key=os.path.getmtime), tmp_path / "killed.ckpt")
    arguments[3] = "data.train_windows=200"
    resumed = run(*arguments, f"ckpt_path={checkpoint}")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "Restored all states" in resumed.stderr
    assert MaskSet.load(folder / "masks.safetensors") == masks
    assert masks.violations(load_file(folder / "model/model.safetensors")) == {}
    after = json.loads((folder / "report.json").read_text())
    assert after["stage"] == "recovered"
    assert after["perplexity"]["dense"] == report["perplexity"]["dense"]
    assert after["perplexity"]["pruned"] == report["perplexity"]["pruned"]
    assert after["perplexity"]["recovered"] < report["perplexity"]["pruned"]
