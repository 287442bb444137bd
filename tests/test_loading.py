"""Blocks that are loaded while the one before is solved for: on a GPU by itself, here made to do so."""

import threading
import weakref

import pytest
import torch

from prune_callbacks import LagrangianAllocation, MaskSet, SparseGPT, Unstructured, prune_checkpoint, prune_sequentially
from prune_callbacks.calibration import prefetch as loading
from prune_callbacks.calibration import sources
from prune_callbacks.calibration.prefetch import Ahead, loading_ahead, visited
from prune_callbacks.engine.solving import BlockPruning
from prune_callbacks.ranks import ALONE
from prune_callbacks.streaming import block_weights
from prune_callbacks.tasks import tiny_llama

PRUNER = SparseGPT(Unstructured(0.5))
CPU = torch.device("cpu")


@pytest.fixture
def batches():
    return list(torch.randint(3, 200, (6, 24)).split(2))


@pytest.fixture
def overlapping(monkeypatch):
    monkeypatch.setattr(loading, "overlaps", lambda where: True)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread.name for thread in threading.enumerate() if "loading the next block" in thread.name]


def model():
    torch.manual_seed(0)
    return tiny_llama(hidden_size=32, layers=4)


def test_what_was_begun_is_taken_once():
    ahead = Ahead(CPU)
    assert ahead.take() is None
    ahead.begin(lambda: {"a": torch.arange(3)})
    assert ahead.take()["a"].tolist() == [0, 1, 2]
    assert ahead.take() is None
    ahead.close()


def test_an_error_in_reading_is_met_when_taking():
    def read():
        raise ValueError("the file is gone")

    ahead = Ahead(CPU)
    ahead.begin(read)
    with pytest.raises(ValueError, match="the file is gone"):
        ahead.take()
    ahead.close()


def test_nothing_is_loaded_ahead_on_the_cpu():
    with loading_ahead(CPU) as ahead:
        assert ahead is None


@pytest.mark.parametrize("allocation", [None, LagrangianAllocation(points=1)], ids=["even", "allocated"])
def test_pruning_ends_the_same(batches, overlapping, monkeypatch, allocation):
    begun = []
    begin = Ahead.begin
    monkeypatch.setattr(Ahead, "begin", lambda self, read: (begun.append(read), begin(self, read)))
    there = model()
    report = prune_sequentially(there, batches, PRUNER, device="cpu", allocation=allocation, progress=False)
    assert len(begun) == 3 * (1 if allocation is None else 2)
    here = model()
    assert report.masks == prune_sequentially(here, batches, PRUNER, allocation=allocation, progress=False).masks
    assert len(begun) == 3 * (1 if allocation is None else 2)
    assert all(torch.equal(tensor, there.state_dict()[name]) for name, tensor in here.state_dict().items())


@pytest.fixture
def copying(overlapping, monkeypatch):
    """As to a GPU: what is not there yet is copied, what is there already is not."""
    there = set()

    def copied(self, read):
        return {name: value if value.data_ptr() in there else value.clone() for name, value in read().items()}

    def move(block, where, ahead):
        loading_move(block, where, ahead)
        there.update(parameter.data_ptr() for parameter in block.parameters())

    loading_move = loading._move
    monkeypatch.setattr(Ahead, "_copied", copied)
    monkeypatch.setattr(loading, "_move", move)


@pytest.mark.parametrize("other", [1, 2])
def test_blocks_that_share_a_weight_see_it_changed(copying, other):
    blocks = [(str(i), torch.nn.Linear(4, 4)) for i in range(3)]
    blocks[other][1].weight = blocks[0][1].weight
    wanted = torch.full((4, 4), 7.0)
    for index, _, block, _ in visited(blocks, CPU, ALONE):
        if index == 0:
            block.weight.data.copy_(wanted)
    assert torch.equal(blocks[other][1].weight, wanted)
    assert blocks[other][1].weight is blocks[0][1].weight


def test_without_room_for_two_blocks_they_are_loaded_one_by_one(batches, overlapping, monkeypatch):
    tried = []

    def full(self, read):
        tried.append(read())
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Ahead, "_copied", full)
    there, here = model(), model()
    report = prune_sequentially(there, batches, PRUNER, device="cpu", progress=False)
    assert len(tried) == 3
    assert report.masks == prune_sequentially(here, batches, PRUNER, progress=False).masks


def test_measuring_for_an_allocation_lets_go_of_a_block_before_the_next(batches, monkeypatch):
    alive = []
    collect = sources.collect

    def noting(*arguments, **settings):
        assert not any(reference() is not None for reference in alive)
        alive.clear()
        found = collect(*arguments, **settings)
        alive.extend(weakref.ref(statistic) for statistic in found.values())
        return found

    monkeypatch.setattr(sources, "collect", noting)
    prune_sequentially(model(), batches, PRUNER, allocation=LagrangianAllocation(points=1), progress=False)
    assert alive


def test_an_error_in_a_block_ends_the_thread(batches, overlapping):
    there = model()
    there.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer model.layers.1"):
        prune_sequentially(there, batches, PRUNER, device="cpu", progress=False)


@pytest.fixture
def source(tmp_path):
    model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def streamed(source, target, batches):
    prune_checkpoint(source, target, PRUNER, batches, progress=False)
    return {path.name: path.read_bytes() for path in (target / "model").iterdir()}, MaskSet.load(
        target / "masks.safetensors"
    )


def test_streaming_ends_the_same(tmp_path, source, batches, monkeypatch):
    wanted = streamed(source, tmp_path / "one_by_one", batches)
    monkeypatch.setattr(loading, "overlaps", lambda where: True)
    assert streamed(source, tmp_path / "ahead", batches) == wanted


@pytest.mark.parametrize("ahead", [True, False])
def test_the_next_block_is_read_while_one_is_pruned(tmp_path, source, batches, monkeypatch, ahead):
    monkeypatch.setattr(loading, "overlaps", lambda where: ahead)
    read, seen = [threading.Event() for _ in range(4)], []
    original, prune = block_weights.read_weights, BlockPruning.prune

    def noting(checkpoint, model, places):
        read[int(next(iter(places)).split(".")[2])].set()
        return original(checkpoint, model, places)

    def waiting(self, layers, *rest):
        index = int(next(iter(layers)).split(".")[2])
        if index < 3:
            seen.append(read[index + 1].wait(20 if ahead else 0.2))
        return prune(self, layers, *rest)

    monkeypatch.setattr(block_weights, "read_weights", noting)
    monkeypatch.setattr(BlockPruning, "prune", waiting)
    streamed(source, tmp_path / "target", batches)
    assert seen == [ahead] * 3


def test_a_block_that_cannot_be_read_stops_before_it_and_keeps_what_is_done(
    tmp_path, source, batches, overlapping, monkeypatch
):
    original = block_weights.read_weights

    def failing(checkpoint, model, places):
        if any("layers.2." in name for name in places):
            raise ValueError("shard of block 2 is truncated")
        return original(checkpoint, model, places)

    with monkeypatch.context() as patched:
        patched.setattr(block_weights, "read_weights", failing)
        with pytest.raises(ValueError, match="shard of block 2 is truncated"):
            streamed(source, tmp_path / "target", batches)
    assert sorted(path.name for path in (tmp_path / "target/streaming").glob("block_*.json")) == [
        "block_00000.json",
        "block_00001.json",
    ]
    assert streamed(source, tmp_path / "target", batches) == streamed(source, tmp_path / "fresh", batches)
