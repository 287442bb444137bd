"""Block reconstruction of checkpoints in files: equal to memory bit for bit, killed anywhere, and what is held."""

import json
import shutil
import warnings

import pytest
import test_streaming
import torch
from test_streaming import _CrashError, crash, in_memory, llama, prune, same, saved  # noqa: F401 (a fixture)
from tiers import slow
from transformers import AutoModelForCausalLM

from prune_callbacks import NM, BlockReconstruction, Magnitude, MaskSet, SparseGPT
from prune_callbacks.streaming import inputs as streaming_inputs
from prune_callbacks.streaming import walk

FEW = BlockReconstruction(passes=2, learning_rate=0.005, held_out=0.25)
SPARSEGPT = SparseGPT(NM(2, 4))


@pytest.fixture
def source(tmp_path):
    return saved(tmp_path / "source", llama())


@pytest.fixture
def batches():
    return list(torch.randint(3, 60, (6, 24), generator=torch.Generator().manual_seed(0)).split(2))


def content(folder):
    """The hashes of all files; times are left out of the report."""
    found, report = test_streaming.content(folder), json.loads((folder / "report.json").read_text())
    found["report.json"] = str(without_times(report))
    return found


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "peak_memory_bytes")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("pruner", [SPARSEGPT, Magnitude(NM(2, 4))], ids=["SparseGPT", "Magnitude"])
@pytest.mark.parametrize("kind", ["llama", "bfloat16", "gpt2", "tied"])
def test_it_is_what_memory_makes(tmp_path, batches, kind, pruner):
    source = saved(tmp_path / "source", test_streaming.MODELS[kind]())
    written = prune(source, tmp_path / "target", batches, pruner, reconstruction=FEW)
    report = same(source, tmp_path / "target", batches, pruner, reconstruction=FEW)
    blocks = written["reconstruction"]["blocks"]
    assert [(b["name"], b["before"], b["after"], b["best_pass"]) for b in blocks] == [
        (b.name, b.before, b.after, b.best_pass) for b in report.reconstruction
    ]
    assert any(not block.put_back for block in report.reconstruction)
    assert not any(written["violations"].values())
    control = in_memory(source, batches, pruner)[0].state_dict()
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "target/model").state_dict()
    assert not all(torch.equal(value, streamed[name]) for name, value in control.items())


@pytest.mark.parametrize("first", [1, slow(2), slow(3)])
def test_a_call_that_goes_on_after_a_crash_anywhere_ends_the_same(tmp_path, crash, first):  # noqa: F811
    source = saved(tmp_path / "source", llama(num_hidden_layers=2))
    batches = list(torch.randint(3, 60, (4, 12)).split(2))
    crash["count"] = 0
    settings = {"targets": "*.down_proj", "reconstruction": FEW}
    prune(source, tmp_path / "whole", batches, Magnitude(NM(2, 4)), **settings)
    operations, wanted = crash["count"], content(tmp_path / "whole")
    assert operations > 30
    for at in range(first, operations + 1, 3):
        target = tmp_path / f"target_{at}"
        crash.update(count=0, at=at)
        with pytest.raises(_CrashError):
            prune(source, target, batches, Magnitude(NM(2, 4)), **settings)
        crash["at"] = None
        prune(source, target, batches, Magnitude(NM(2, 4)), **settings)
        assert content(target) == wanted, at
        shutil.rmtree(target)


def test_hidden_states_stand_in_files_and_are_removed(tmp_path, source, batches, monkeypatch):
    seen = []
    original = streaming_inputs.write_tensors

    def spy(path, *args, **kwargs):
        seen.append(path.parent.name.removesuffix(".partial"))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(streaming_inputs, "write_tensors", spy)
    target = tmp_path / "target"
    prune(source, target, batches, reconstruction=FEW)
    assert set(seen) == {"hidden_00000", "hidden_00001", "hidden_00002", "dense_00001", "dense_00002", "dense_00003"}
    assert not (target / "streaming").exists()


def test_a_missing_stream_and_another_setting_are_named(tmp_path, source, batches, monkeypatch):
    target = tmp_path / "target"
    original = walk.collect

    def spy(statistic, index, *args):
        if index == 2:
            raise _CrashError
        return original(statistic, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(walk, "collect", spy)
        with pytest.raises(_CrashError):
            prune(source, target, batches, reconstruction=FEW)
    with pytest.raises(ValueError, match=r"reconstruction was BlockReconstruction\(passes=2.* and is None"):
        prune(source, target, [row for batch in batches for row in batch.split(1)])
    shutil.rmtree(target / "streaming/dense_00002")
    with pytest.raises(ValueError, match="dense_00002 is missing, with the hidden states"):
        prune(source, target, batches, reconstruction=FEW)


def test_bad_calls_are_refused_before_work(tmp_path, source):
    one = [torch.randint(3, 60, (1, 24))]
    for given, text in ((None, "needs calibration batches, got None"), (one, "none is left to train on")):
        with pytest.raises(ValueError, match=text):
            prune(source, tmp_path / "target", given, Magnitude(NM(2, 4)), reconstruction=FEW)
    assert not (tmp_path / "target").exists()


def test_masks_are_those_of_pruning_alone_in_the_first_block(tmp_path, source, batches):
    prune(source, tmp_path / "with", batches, SPARSEGPT, reconstruction=FEW)
    prune(source, tmp_path / "without", [row for b in batches for row in b.split(1)], SPARSEGPT)
    one, other = (MaskSet.load(tmp_path / name / "masks.safetensors") for name in ("with", "without"))
    first = [name for name in one if ".layers.0." in name]
    assert first
    assert all(torch.equal(one[name], other[name]) for name in first)


def test_blocks_that_are_all_put_back_are_told_of_also_after_a_kill(tmp_path, source, batches, monkeypatch):
    """A learning rate that makes every block worse; the call that is killed has reconstructed the first block."""
    worse = BlockReconstruction(passes=1, learning_rate=100.0, held_out=0.25)
    text = "reconstruction made none of 3 blocks better on the windows that decide"
    with pytest.warns(UserWarning, match=text):
        report = prune(source, tmp_path / "whole", batches, SPARSEGPT, reconstruction=worse)
    assert any(text in told for told in report["warnings"])
    original, calls = walk.store_next, []

    def killed(index, *arguments):
        calls.append(index)
        if index == 1:
            raise KeyboardInterrupt
        return original(index, *arguments)

    monkeypatch.setattr(walk, "store_next", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "target", batches, SPARSEGPT, reconstruction=worse)
    assert 0 in calls
    monkeypatch.setattr(walk, "store_next", original)
    with pytest.warns(UserWarning, match=text):
        again = prune(source, tmp_path / "target", batches, SPARSEGPT, reconstruction=worse)
    assert again["warnings"] == report["warnings"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(source, tmp_path / "better", batches, SPARSEGPT, reconstruction=FEW)  # control
