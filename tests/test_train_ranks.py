"""train.py on two processes: one folder for all, a rank killed, a checkpoint consolidated."""

import json
import pickle
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from launch import TORCHRUN, TRAIN, cold_started, one_set, ranks, together, train, trained
from rank_fits import Module, half_masks
from safetensors.torch import load_file
from tiers import slow
from transformers import AutoModelForCausalLM

from prune_callbacks import MaskSet, consolidate
from prune_callbacks.storage.checkpoints import newest_checkpoint, open_checkpoint
from prune_callbacks.tasks import tiny_llama

RECOVER = ["recipe=recover_deepspeed", "smoke=true", "trainer.devices=2", "trainer.accelerator=cpu"]
CPU_ZERO = ["trainer.strategy._target_=cpu_strategies.CPUDeepSpeedStrategy", "trainer.precision=32-true"]


def on(trainer):
    return [*RECOVER, f"trainer={trainer}", *(CPU_ZERO if "deepspeed" in trainer else [])]


@pytest.mark.parametrize("trainer", [slow("deepspeed_zero2"), "deepspeed_zero3", "fsdp2"])
def test_a_run_on_two_processes_and_its_checkpoint_consolidated(tmp_path, trainer):
    folder, plain = tmp_path / "run", tmp_path / "plain"
    together(TRAIN, *on(trainer), f"output_dir={folder}")
    report = json.loads((folder / "report.json").read_text())
    assert report["violations"] == {}
    assert report["sparsity"]["achieved"] == 0.5
    assert report["perplexity"]["recovered"] < report["perplexity"]["pruned"]
    assert report["processes"] == 2
    assert report["optimizer_steps"] == 4  # 32 windows, 4 a step on each of 2 processes
    printed = trained("recipe=consolidate", f"run={folder}", f"output_dir={plain}").output
    assert "50.00% zeros in 28 masked layers, 0 violations" in " ".join(printed.split())
    fitted, written = (load_file(where / "model/model.safetensors") for where in (folder, plain))
    assert fitted.keys() == written.keys()
    assert all(torch.equal(weight, written[name]) for name, weight in fitted.items())
    for name in ("masks.safetensors", "model/config.json"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()
    assert {p.name for p in (folder / "model").iterdir()} == {p.name for p in (plain / "model").iterdir()}
    again = json.loads((plain / "report.json").read_text())
    assert again["sparsity"] == report["sparsity"]
    assert again["stage"] == "consolidated"
    assert again["checkpoint"] == str(folder / "checkpoints/step_4.ckpt")
    assert (again["violations"], again["optimizer_steps"]) == ({}, 4)
    assert again["perplexity"]["pruned"] == report["perplexity"]["pruned"]
    # In several files, in bfloat16, over an existing model.
    report = consolidate(
        folder / "checkpoints", folder / "model", plain, dtype="bfloat16", max_shard_size="1MB", progress=False
    )
    assert report["violations"] == {}
    assert len(list((plain / "model").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(plain / "model")
    assert loaded.dtype == torch.bfloat16
    assert MaskSet.load(plain / "masks.safetensors").violations(loaded.named_parameters()) == {}
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, fitted.get(name, fitted["model.embed_tokens.weight"]).bfloat16()), name


def test_processes_that_were_started_one_by_one_are_told_to_name_a_folder(tmp_path):
    done = train(*on("ddp"), environment={"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"})
    assert done.returncode == 1
    assert "need one folder for all of them: output_dir=" in done.stderr


SAVED = ["callbacks.checkpoint.every_n_train_steps=10"]


@pytest.mark.parametrize(("trainer", "victim"), [slow("ddp", 1), slow("fsdp2", 0), ("deepspeed_zero3", 0)])
def test_a_killed_rank_ends_the_run_with_a_word_and_it_goes_on_from_its_checkpoint(tmp_path, trainer, victim):
    folder = tmp_path / "run"
    arguments = [*on(trainer), f"output_dir={folder}", *SAVED]
    with ranks(TRAIN, *arguments, "data.train_windows=800") as processes:
        other, deadline = processes[1 - victim], time.monotonic() + 180
        while not (folder / "checkpoints/step_20.ckpt").exists():  # the second one: then the first is complete
            assert all(process.poll() is None for process in processes), other.output
            assert time.monotonic() < deadline, other.output
            time.sleep(0.02)
        processes[victim].send_signal(signal.SIGKILL)
        left = other.wait(timeout=60)
    assert left.returncode == 1
    resumes(folder, arguments, named(left.output, 1 - victim))


def named(output, rank):
    """The checkpoint that the remaining process names."""
    assert f"rank {rank} of 2: another process of the training is gone" in output
    return Path(re.search(r"Resume with the same settings and ckpt_path=(\S+)", output)[1])


def resumes(folder, arguments, checkpoint):
    """A run whose other process was lost goes on from its checkpoint."""
    assert checkpoint.parent == folder / "checkpoints"
    masks = (folder / "masks.safetensors").read_bytes()
    resumed = together(TRAIN, *arguments, "data.train_windows=200", f"ckpt_path={checkpoint}")
    assert "Restored all states" in resumed[0].output
    assert (folder / "masks.safetensors").read_bytes() == masks
    report = json.loads((folder / "report.json").read_text())
    assert report["stage"] == "recovered"
    assert report["violations"] == {}


def ranks_of(process):
    """The training processes by their local rank."""
    found = {}
    for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        if "torch.distributed.run" not in child.cmdline() and str(TRAIN) in child.cmdline():
            found[child.environ().get("LOCAL_RANK", "0")] = child
    return found


@pytest.mark.parametrize(("trainer", "launcher", "victim"), [("ddp", [], "1"), slow("deepspeed_zero3", TORCHRUN, "0")])
def test_whoever_starts_the_processes_none_is_left_when_one_is_killed(tmp_path, trainer, launcher, victim):
    """Cold, by the README's commands: the launchers' signals come while the error is on its way."""
    where = [f"output_dir={tmp_path / 'run'}"] if launcher else []  # Lightning's processes agree on a folder
    command = [*(launcher or [sys.executable]), TRAIN, *on(trainer), *where, *SAVED, "data.train_windows=4000"]
    with one_set(), cold_started(*command, folder=tmp_path) as process:
        deadline = time.monotonic() + 180
        while not list(tmp_path.glob("**/checkpoints/step_20.ckpt")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        everyone = ranks_of(process)
        assert set(everyone) == {"0", "1"}
        everyone[victim].kill()
        killed = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode != 0
        psutil.wait_procs(everyone.values(), timeout=60 - (time.monotonic() - killed))
        assert not [child for child in everyone.values() if child.is_running()]
    (folder,) = (checkpoint.parent.parent for checkpoint in tmp_path.glob("**/checkpoints/step_20.ckpt"))
    said = stdout + stderr
    if not launcher and "another process of the training is gone" not in said:
        # Lightning's process looks every 5 seconds and ends itself by SIGKILL; that may come before the word.
        assert "Forcefully terminating all other processes" in said
        checkpoint = newest_checkpoint(folder / "checkpoints")
    else:
        checkpoint = named(said, 1 - int(victim))
    resumes(folder, [*on(trainer), f"output_dir={folder}", *SAVED], checkpoint)


def test_what_cannot_be_consolidated_is_refused(tmp_path):
    model = tiny_llama(hidden_size=32, layers=2)
    model.save_pretrained(tmp_path / "model")
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    state = {"state_dict": weights, "global_step": 3, "callbacks": {}}
    with pytest.raises(ValueError, match=r"there is no config.json in .*absent; name a folder"):
        consolidate(tmp_path, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ValueError, match="there is no checkpoint at .*: neither Lightning's file, nor a folder"):
        consolidate(tmp_path / "nothing", tmp_path / "model", tmp_path / "out")
    torch.save(state, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="holds no masks: it was written without MaskEnforcer"):
        consolidate(tmp_path, tmp_path / "model", tmp_path / "out")
    masks = MaskSet.from_nonzero({n: p for n, p in model.named_parameters() if "proj" in n})
    state["callbacks"] = {"MaskEnforcer": {"masks": masks.state_dict()}}
    torch.save(state, tmp_path / "plain.ckpt")
    assert consolidate(tmp_path, tmp_path / "model", tmp_path / "out", progress=False)["violations"] == {}
    del weights["model.model.norm.weight"]
    torch.save(state, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"is of another model than the configuration: of 20 weights 1 are missing"):
        consolidate(tmp_path, tmp_path / "model", tmp_path / "out")


def test_what_is_missing_on_the_command_line_is_named(tmp_path):
    for arguments, message in (
        (["recipe=consolidate"], "recipe=consolidate needs run=..."),
        (["recipe=wanda_50", "model=pretrained"], "recipe=wanda_50 needs model.path=..."),
        (["recipe=wanda_50", "ckpt_path=a.ckpt"], "resumes in its own folder: name it with output_dir="),
        (["recipe=consolidate", "run=absent", f"output_dir={tmp_path}"], "there is no config.json in absent/model"),
    ):
        done = train(*arguments)
        assert done.returncode == 1
        assert message in done.stderr


def test_control_zeros_that_were_not_held_are_named(tmp_path):
    model = tiny_llama(hidden_size=32, layers=2)
    model.save_pretrained(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    masks = MaskSet(
        {name: torch.arange(model.get_parameter(name).numel()).view(model.get_parameter(name).shape) % 2 > 0}
    )
    state = {
        "state_dict": model.state_dict(),
        "global_step": 3,
        "callbacks": {"MaskEnforcer": {"masks": masks.state_dict()}},
    }
    torch.save(state, tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="1536 pruned weights are not zero in the checkpoint, first in model.layers.0"):
        report = consolidate(tmp_path, tmp_path / "model", tmp_path / "out", progress=False)
    assert report["violations"] == {name: 1536}


def test_masks_under_the_modules_names_and_two_models_in_one_checkpoint(tmp_path):
    model = tiny_llama(hidden_size=32, layers=2)
    model.save_pretrained(tmp_path / "model")
    masks = half_masks(Module()).state_dict()
    kept = [name for name in masks["bits"] if name != "odd.weight"]
    masks = {part: {name: values[name] for name in kept} for part, values in masks.items()}
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    state = {"state_dict": weights, "global_step": 3, "callbacks": {"MaskEnforcer": {"masks": masks}}}
    torch.save(state, tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="pruned weights are not zero in the checkpoint"):
        report = consolidate(tmp_path, tmp_path / "model", tmp_path / "out", progress=False)
    assert len(report["violations"]) == len(report["sparsity"]["layers"]) == 14
    assert all(name.startswith("model.layers.") for name in report["violations"])
    weights |= {f"teacher.{name}": torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "plain.ckpt")
    with pytest.raises(
        ValueError, match=r"several such models, under \['model.', 'teacher.'\]; choose one with prefix="
    ):
        consolidate(tmp_path, tmp_path / "model", tmp_path / "out")
    with pytest.warns(UserWarning, match="pruned weights are not zero in the checkpoint"):
        consolidate(tmp_path, tmp_path / "model", tmp_path / "out", prefix="model.", progress=False)
    written = load_file(tmp_path / "out/model/model.safetensors")
    assert torch.equal(written["model.norm.weight"], model.model.norm.weight)


def test_a_sharded_checkpoint_that_asks_for_more_than_an_index_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("this must not be printed",)

    torch.save({"global_step": 1, "callbacks": {}}, tmp_path / "meta.pt")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="asks for builtins.print, which no index needs: it is not read"):
        open_checkpoint(tmp_path)
    torch.save({"global_step": 1, "hyper_parameters": Evil()}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="holds objects that cannot be read safely, such as the arguments of"):
        open_checkpoint(tmp_path / "plain.ckpt")


def test_checkpoints_whose_writing_was_interrupted_are_passed_over(tmp_path):
    torch.save({"global_step": 1}, tmp_path / "old.ckpt")
    newer = tmp_path / "new.ckpt"
    (newer / "checkpoint").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == tmp_path / "old.ckpt"
    (newer / "latest").write_text("checkpoint")
    assert newest_checkpoint(tmp_path) == tmp_path / "old.ckpt"
    torch.save({"dp_world_size": 2}, newer / "checkpoint/mp_rank_00_model_states.pt")
    for rank in (0, 1):
        assert newest_checkpoint(tmp_path) == tmp_path / "old.ckpt"
        torch.save({}, newer / f"checkpoint/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert newest_checkpoint(tmp_path) == newer
    file = newer / "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-30])
    assert newest_checkpoint(tmp_path) == tmp_path / "old.ckpt"
    assert newest_checkpoint(newer) is None
