"""The command line, in real processes: a run, bad input, a failure after pruning, a kill."""

import json
import shutil
import signal
import time

import pytest
from launch import TRAIN, started, train, trained
from safetensors.torch import load_file

from prune_callbacks import NM, MaskSet
from prune_callbacks.storage.checkpoints import newest_checkpoint


def test_an_unknown_recipe_lists_those_there_are():
    done = train("recipe=wanda_51")
    assert done.returncode == 1
    assert "Could not find 'recipe/wanda_51'" in done.stderr
    assert "wanda_50" in done.stderr


def test_a_run_that_fails_after_pruning_has_saved_the_pruned_model(tmp_path):
    done = train("recipe=wanda_50", "smoke=true", f"output_dir={tmp_path}", "optimizer.lr=-1")
    assert done.returncode == 1
    assert "Invalid learning rate" in done.stderr
    masks = MaskSet.load(tmp_path / "masks.safetensors")
    assert masks.sparsity() == 0.5
    assert masks.violations(load_file(tmp_path / "model/model.safetensors")) == {}


def test_a_killed_run_resumes_to_the_same_masks(tmp_path):
    folder = tmp_path / "run"
    arguments = ["recipe=wanda_50", "smoke=true", f"output_dir={folder}", "data.train_windows=400"]
    arguments += ["callbacks.checkpoint.every_n_train_steps=5"]
    with started(TRAIN, *arguments) as process:
        deadline = time.time() + 120
        while time.time() < deadline and not (folder / "checkpoints/step_10.ckpt").exists():
            assert process.poll() is None, process.output
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
    report = json.loads((folder / "report.json").read_text())
    assert report["stage"] == "pruned"
    assert report["perplexity"]["pruned"] > 0
    assert report["perplexity"]["recovered"] is None
    masks = MaskSet.load(folder / "masks.safetensors")
    assert masks.violations(load_file(folder / "model/model.safetensors")) == {}
    checkpoint = shutil.copy(newest_checkpoint(folder / "checkpoints"), tmp_path / "killed.ckpt")
    arguments[3] = "data.train_windows=100"
    resumed = trained(*arguments, f"ckpt_path={checkpoint}")
    assert "Restored all states" in resumed.stderr
    assert MaskSet.load(folder / "masks.safetensors") == masks
    assert masks.violations(load_file(folder / "model/model.safetensors")) == {}
    after = json.loads((folder / "report.json").read_text())
    assert after["stage"] == "recovered"
    assert after["perplexity"]["dense"] == report["perplexity"]["dense"]
    assert after["perplexity"]["pruned"] == report["perplexity"]["pruned"]
    assert after["perplexity"]["recovered"] < report["perplexity"]["pruned"]


THREE_ROUNDS = ["recipe=imp_90", "smoke=true", "schedule.rounds=3", "trainer.max_steps=15"]


def test_imp_beside_one_shot(tmp_path):
    done = trained(*THREE_ROUNDS, f"output_dir={tmp_path}")
    imp, one_shot = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, tmp_path / "oneshot_90"))
    assert imp["optimizer_steps"] == one_shot["optimizer_steps"] == 15
    assert [entry["step"] for entry in imp["rounds"]] == [6, 9, 12, 15]
    kept = [1 - entry["sparsity"] for entry in imp["rounds"]]
    assert kept == pytest.approx([0.1 ** (r / 3) for r in range(4)], abs=1e-5)
    assert [round(entry["sparsity"], 4) for entry in one_shot["rounds"]] == [0.0, 0.9]
    assert imp["violations"] == one_shot["violations"] == {}
    assert imp["rounds"][0]["perplexity"] == imp["perplexity"]["dense"]
    assert imp["rounds"][-1]["perplexity"] == imp["perplexity"]["recovered"]
    assert "the trained model at the end of every round" in done.stdout
    assert "oneshot_90" in done.stdout
    page = (tmp_path / "compare.html").read_text()
    assert f"{tmp_path.name}/oneshot_90" in page
    assert "2 runs side by side" in page
    for picture in ("compared.png", "sparsity.png", "report.png", "oneshot_90/report.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    # Again: the run itself is refused. Without it, what is finished beside it is not run again, and not for other data.
    again = train(*THREE_ROUNDS, f"output_dir={tmp_path}")
    assert again.returncode == 1
    assert "already holds a run" in again.stderr
    for name in ("report.json", "masks.safetensors"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "model")
    other = train(*THREE_ROUNDS, f"output_dir={tmp_path}", "seed=1")
    assert "holds a oneshot_90 of another configuration. Choose another output_dir" in other.stderr
    again = trained(*THREE_ROUNDS, f"output_dir={tmp_path}")
    assert "round 1 of 1:" not in again.output
    assert "round 1 of 3:" in again.output


def test_what_is_wrong_with_imp_is_said_before_anything_runs(tmp_path):
    short = ["recipe=oneshot_90", "smoke=true", "trainer.max_steps=10", "callbacks.checkpoint.every_n_train_steps=9"]
    trained(*short, f"output_dir={tmp_path}/c")
    foreign = f"ckpt_path={tmp_path}/c/checkpoints/step_9.ckpt"
    failed = train(*THREE_ROUNDS, "beside=[]", f"output_dir={tmp_path}/d", foreign)
    assert "the checkpoint was written by recipe oneshot_90" in failed.stderr
    failed = train(*THREE_ROUNDS, f"output_dir={tmp_path}/e", "pruner=wanda")
    assert "IterativePrune chooses among the weights as they are trained, by Magnitude" in failed.stderr
    assert not (tmp_path / "e").exists()


def test_imp_killed_in_its_third_round_ends_with_the_same_bits(tmp_path):
    """A real process, a real SIGKILL; rounds of 20 steps, epochs of 8, the checkpoint at step 50 of 80."""
    arguments = ["recipe=imp_90", "smoke=true", "beside=[]", "trainer.max_steps=80"]
    arguments += ["schedule.rounds=3", "schedule.begin=20", "schedule.every=20"]
    arguments += ["module.scheduler_steps=23", "callbacks.checkpoint.every_n_train_steps=50"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trained(*arguments, f"output_dir={whole}")
    with started(TRAIN, *arguments, f"output_dir={killed}") as process:
        checkpoint, deadline, size = killed / "checkpoints/step_50.ckpt", time.time() + 120, -1
        while time.time() < deadline and (not checkpoint.exists() or checkpoint.stat().st_size != size):
            assert process.poll() is None, process.output
            size = checkpoint.stat().st_size if checkpoint.exists() else -1
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
    assert not (killed / "model").exists()
    resumed = trained(*arguments, f"output_dir={killed}", f"ckpt_path={checkpoint}")
    assert "round 2 of 3" not in resumed.output
    assert "round 3 of 3" in resumed.output
    for name in ("masks.safetensors", "model/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    rounds = [json.loads((folder / "report.json").read_text())["rounds"] for folder in (whole, killed)]
    assert rounds[0] == rounds[1]


@pytest.mark.parametrize(
    "recipe", ["gradual_cubic_80", "recover_distill", "recover_lora", "recover_masked_lora", "best_2of4", "best_50"]
)
def test_recovery_recipes_in_small(tmp_path, recipe):
    trained(f"recipe={recipe}", "smoke=true", f"output_dir={tmp_path}")
    report = json.loads((tmp_path / "report.json").read_text())
    target = 0.8 if recipe == "gradual_cubic_80" else 0.5
    assert report["sparsity"]["achieved"] == pytest.approx(target, abs=1e-3)
    assert report["violations"] == {}
    measured = report["perplexity"]
    assert measured["recovered"] < measured["dense" if recipe == "gradual_cubic_80" else "pruned"]  # begins untrained
    masks, weights = MaskSet.load(tmp_path / "masks.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert masks.violations(weights) == {}
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    assert (tmp_path / "adapter/adapter_model.safetensors").exists() == (recipe == "recover_lora")


@pytest.mark.parametrize(
    "recipe", ["wanda_2of4", "sparsegpt_2of4", "mrp_50", "mrp_2of4", "alps_50", "alps_2of4", "demo"]
)
def test_one_shot_recipes_in_small(tmp_path, recipe):
    trained(f"recipe={recipe}", "smoke=true", f"output_dir={tmp_path}")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recipe"] == recipe
    assert report["violations"] == {}
    assert report["perplexity"]["recovered"] < report["perplexity"]["pruned"]
    masks = MaskSet.load(tmp_path / "masks.safetensors")
    assert masks.violations(load_file(tmp_path / "model/model.safetensors")) == {}
    if recipe.endswith("2of4"):
        masks.check(NM(2, 4))
    else:
        assert masks.sparsity() == 0.5


def test_weights_and_biases_offline(tmp_path):
    pytest.importorskip("wandb")
    arguments = ["recipe=magnitude_50", "smoke=true", "logger=wandb", f"output_dir={tmp_path}"]
    trained(*arguments, environment={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"train_loss" in content
    assert b"magnitude_50" in content
