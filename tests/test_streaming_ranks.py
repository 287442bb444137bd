"""A checkpoint pruned from files by two processes together: as by one, killed and resumed, and bad input."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from launch import TRAIN, ranks, together, trained
from safetensors.torch import load_file
from streaming_ranks import CASES, prune
from test_streaming import content, llama, saved
from tiers import slow

from prune_callbacks import NM, Magnitude, MaskSet
from prune_callbacks.ranks import ALONE
from prune_callbacks.streaming import prune_on_windows
from prune_callbacks.tasks import tiny_checkpoint

SCRIPT = Path(__file__).parent / "streaming_ranks.py"


@pytest.fixture
def folder(tmp_path):
    saved(tmp_path / "source", llama(), max_shard_size="10KB")
    torch.save(list(torch.randint(3, 60, (6, 24)).split(2)), tmp_path / "batches.pt")
    return tmp_path


def weights(target):
    return {k: v for path in target.glob("model/*.safetensors") for k, v in load_file(path).items()}


def test_two_ranks_write_what_one_writes(folder):
    together(SCRIPT, "equal", folder)
    for case in CASES:
        prune(folder, f"{case}_alone", case, ALONE)
        one, two = (MaskSet.load(folder / f"{case}_{how}/masks.safetensors") for how in ("alone", "together"))
        assert sum(int((one[name] != two[name]).sum()) for name in one) == 0, case
        own, other = (weights(folder / f"{case}_{how}") for how in ("alone", "together"))
        assert own.keys() == other.keys()
        dense = load_source(folder / "source")
        for name, value in own.items():
            changed = (value - dense[name]).norm()
            assert (value - other[name]).norm() <= 1e-3 * changed + 1e-6, (case, name)
        files = {path.name for path in (folder / f"{case}_alone").rglob("*")}
        assert files == {path.name for path in (folder / f"{case}_together").rglob("*")}
    alone = MaskSet.load(folder / "sparsegpt_alone/masks.safetensors")
    assert alone != MaskSet.load(folder / "one_batch/masks.safetensors")  # control: the batches decide


def load_source(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("killed", [slow(0), 1])
def test_a_killed_rank_loses_nothing(folder, killed):
    together(SCRIPT, "kill", folder)
    wanted = content(folder / "killed")
    (folder / "killed").rename(folder / "whole")
    for trace in ("streaming/hidden_00000", "streaming/block_00001.json"):
        with ranks(SCRIPT, "kill", folder) as processes:
            give_up = time.monotonic() + 60
            while not (folder / "killed" / trace).exists():
                assert all(process.poll() is None for process in processes), processes[0].output
                assert time.monotonic() < give_up
                time.sleep(0.005)
            processes[killed].send_signal(signal.SIGKILL)
            assert processes[killed].wait().returncode == -signal.SIGKILL
            other = processes[1 - killed].wait()  # by itself: it does not wait for a rank that is gone
            assert other.returncode not in (0, None), other.output
        assert not (folder / "killed/report.json").exists()
    together(SCRIPT, "kill", folder)
    assert content(folder / "killed") == wanted


def test_one_rank_goes_on_where_two_were_killed(folder):
    with ranks(SCRIPT, "kill", folder) as processes:
        first, give_up = folder / "killed/streaming/block_00000.json", time.monotonic() + 60
        while not first.exists():
            assert all(process.poll() is None for process in processes), processes[0].output
            assert time.monotonic() < give_up
            time.sleep(0.005)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
    shard = next((folder / "killed/model.partial").glob("model-00001-of-*.safetensors"))
    written = shard.stat().st_mtime_ns
    prune(folder, "killed", "sparsegpt", ALONE)
    assert (folder / "killed/model" / shard.name).stat().st_mtime_ns == written  # it was not made again
    prune(folder, "alone", "sparsegpt", ALONE)
    masks = [MaskSet.load(folder / f"{name}/masks.safetensors") for name in ("killed", "alone")]
    assert masks[0] == masks[1]


def test_what_one_rank_cannot_do_is_refused_on_all_and_loses_nothing(folder):
    """In one pair of processes: bad input, what the others hear of it, and the warnings of a rank."""
    together(SCRIPT, "refused", folder)
    prune(folder, "alone", "sparsegpt", ALONE)
    masks = [MaskSet.load(folder / f"{name}/masks.safetensors") for name in ("refused", "alone")]
    assert masks[0] == masks[1]


def test_the_recipe_under_torchrun_writes_what_one_process_writes(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    command = ["recipe=prune_streaming", "smoke=true", f"source={source}"]
    together(TRAIN, *command, f"output_dir={tmp_path / 'two'}")
    trained(*command, f"output_dir={tmp_path / 'one'}")
    masks = [MaskSet.load(tmp_path / f"{count}/masks.safetensors") for count in ("one", "two")]
    assert masks[0] == masks[1]
    reports = [json.loads((tmp_path / f"{count}/report.json").read_text()) for count in ("one", "two")]
    assert [report["processes"] for report in reports] == [1, 2]
    assert reports[0]["sparsity"] == reports[1]["sparsity"]
    assert (tmp_path / "two/report.html").exists()


def test_a_report_that_was_written_before_the_kill_is_found_by_all_ranks(folder):
    """A kill between the report and the removal of the working files leaves both."""
    prune(folder, "sparsegpt_together", "sparsegpt", ALONE)
    target = folder / "sparsegpt_together"
    (target / "streaming").mkdir()
    (target / "streaming/setting.json").write_text(
        json.dumps({"setting": json.loads((target / "report.json").read_text())["setting"]})
    )
    wanted = content(target)
    together(SCRIPT, "equal", folder)
    assert content(target) == {name: value for name, value in wanted.items() if "streaming" not in str(name)}


@pytest.mark.parametrize(
    ("variables", "device", "error"),
    [
        ({}, "cuda", "device='cuda', and there are no CUDA devices"),
        ({}, "gpu", "device='gpu' is unknown to torch"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "cuda:0", "is one GPU for all processes of a machine"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None, "srun has started 4 processes, which do not know of each"),
    ],
)
def test_processes_that_cannot_share_are_refused(tmp_path, monkeypatch, variables, device, error):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    source = tiny_checkpoint(tmp_path / "dense")
    if device == "cuda:0":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=error):
        prune_on_windows(source, tmp_path / "out", Magnitude(NM(2, 4)), None, device=device)
    assert not (tmp_path / "out").exists()
