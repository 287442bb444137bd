"""Packed masks against plain ones, and the selection over ranks that are threads."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_callbacks import MaskSet
from prune_callbacks.parallel.packed import PackedKeep, _bytes_of_bits, count_removed, zero_removed
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.sparsity import keep_largest, keep_largest_of_all

CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 70), st.integers(0, 70), st.integers(0, 70), st.integers(0, 99))
def test_any_stretch_of_a_mask_is_unpacked(count, start, stop, seed):
    start, stop = sorted((min(start, count), min(stop, count)))
    keep = torch.rand(count, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = PackedKeep(MaskSet({"a": keep}).packed("a"), start, stop, CPU)
    assert torch.equal(packed.unpacked(), keep[start:stop])


def test_the_table_for_devices_unpacks_as_numpy_does():
    bits = torch.arange(256, dtype=torch.uint8)
    unpacked = _bytes_of_bits(CPU).index_select(0, bits.int()).view(torch.bool)
    assert torch.equal(unpacked, PackedKeep(bits, 0, 2048, CPU).unpacked())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_removed_becomes_plus_zero_and_nothing_else_changes(dtype):
    odd = [torch.nan, torch.inf, -torch.inf, -1.0, -0.0, 1e-40, 2.5, -3.0]
    values = torch.tensor(odd + odd, dtype=dtype)
    keep = torch.arange(16) >= 8
    before = values.clone()
    zero_removed(values, keep)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[values.element_size()]
    assert values[:8].view(integers).tolist() == [0] * 8
    assert torch.equal(values[8:].view(integers), before[8:].view(integers))
    assert count_removed(before, keep) == (7 if dtype in (torch.float64, torch.float32, torch.bfloat16) else 6)
    assert count_removed(values, keep) == 0


def test_weights_in_another_order_of_memory_are_masked_in_place():
    weight = torch.ones(6, 4).T
    keep = torch.arange(24).view(4, 6) % 3 > 0
    zero_removed(weight, keep.flatten())
    assert torch.equal(weight != 0, keep)


class Threads(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank, size, shared):
        super().__init__()
        self.rank, self.size, self.shared = rank, size, shared

    def gather(self, value):
        slots, barrier = self.shared
        slots[self.rank] = value
        barrier.wait(20)
        values = list(slots)
        barrier.wait(20)
        return values

    def sum(self, tensor):
        total = torch.stack(self.gather(tensor.clone())).sum(0)
        return tensor.copy_(total)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4), st.booleans())
def test_the_selection_over_ranks_is_that_of_one(data, size, coarse):
    """Each tensor cut anywhere, some ranks with nothing; ties over the cuts."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores, parts = {}, [{} for _ in range(size)]
    for name in ("a", "b", "c"):
        values = torch.randn(data.draw(st.integers(0, 12)), generator=generator)
        scores[name] = (values * 2).round() / 2 if coarse else values
        cuts = sorted(data.draw(st.integers(0, len(values))) for _ in range(size - 1))
        for part, piece in zip(parts, scores[name].tensor_split(cuts), strict=True):
            part[name] = piece
    flat = torch.cat(list(scores.values()))
    kept = data.draw(st.integers(0, len(flat)))
    shared, results = ([None] * size, threading.Barrier(size)), [{} for _ in range(size)]

    def select(rank):
        results[rank] = dict(keep_largest_of_all(parts[rank], kept, Threads(rank, size, shared)))

    threads = [threading.Thread(target=select, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    chosen = torch.cat([torch.cat([result[name] for result in results]) for name in scores])
    assert torch.equal(chosen, keep_largest(flat, kept))


def test_one_process_alone_communicates_with_nobody():
    tensor = torch.tensor([1.0, 2.0])
    assert ALONE.sum(tensor) is tensor
    assert ALONE.gather("a") == ["a"]
    assert ALONE.share("a") == "a"
    assert ALONE.before(torch.tensor([3, 4])).tolist() == [0, 0]
    with pytest.raises(KeyError):
        ALONE.attempt(lambda: {}["absent"])
