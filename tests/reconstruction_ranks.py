"""Run by a test as two processes: a model reconstructed by both together, and by one alone."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from prune_callbacks import (
    NM,
    BlockReconstruction,
    MeasuredAllocation,
    SparseGPT,
    Unstructured,
    Wanda,
    prune_sequentially,
    write_windows,
)
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.tasks import tiny_llama

dist.init_process_group("gloo")
everywhere = Ranks(dist.group.WORLD)
windows = torch.randint(3, 200, (10, 24), generator=torch.Generator().manual_seed(0))


def made(batches, ranks, **settings):
    model = tiny_llama(0, hidden_size=32, layers=2)
    setting = BlockReconstruction(passes=2, learning_rate=0.005, held_out=0.2, **settings)
    report = prune_sequentially(
        model, batches, SparseGPT(NM(2, 4)), reconstruction=setting, progress=False, ranks=ranks
    )
    return model, report


shares = {
    "in turns": windows[everywhere.rank :: 2].split(1),
    "halves": windows[5 * everywhere.rank : 5 * everywhere.rank + 5].split(2),
    "all on the second": list(windows.split(3)) if everywhere.rank else [],
}
for batch_size, labels in ((1, ("all on the second",)), (4, ("in turns", "halves"))):
    single, expected = made(windows.split(2), ALONE, batch_size=batch_size)
    other_seed, _ = made(windows.split(2), ALONE, batch_size=batch_size, seed=1)
    for label in labels:
        mine = shares[label]
        model, report = made(mine, everywhere, batch_size=batch_size)
        assert report.masks == expected.masks, label
        for block, other in zip(report.reconstruction, expected.reconstruction, strict=True):
            assert block.best_pass == other.best_pass, (label, block, other)
            assert abs(block.after - other.after) < 1e-3 * other.after, (label, block, other)
        triples = zip(model.named_parameters(), single.parameters(), other_seed.parameters(), strict=True)
        for (name, value), other, control in triples:
            assert (value - other).norm() < 0.02 * (control - other).norm() + 1e-6, (label, name)
            first = everywhere.broadcast(value.detach().clone(), 0)
            assert torch.equal(first, value), (label, name)
        assert report.masks.violations(model.named_parameters()) == {}
dense = tiny_llama(0, hidden_size=32, layers=2)
both = write_windows(dense, shares["in turns"], 7, batch_size=3, progress=False, ranks=everywhere)
assert torch.equal(both, write_windows(dense, windows.split(1), 7, batch_size=3, progress=False))
assert torch.equal(both[:, :16], windows[:7, :16])
assert everywhere.gather(both.sum().item())[0] == both.sum()
measured = dense.eval()
report = prune_sequentially(
    measured,
    shares["in turns"],
    Wanda(Unstructured(0.5)),
    allocation=MeasuredAllocation(windows=2),
    progress=False,
    ranks=everywhere,
)
assert len({layer.sparsity for layer in report.layers}) > 2
assert len({str(pattern) for pattern in everywhere.gather([layer.sparsity for layer in report.layers])}) == 1
for name, value in measured.named_parameters():
    assert torch.equal(everywhere.broadcast(value.detach().clone(), 0), value), name
Path(sys.argv[1], f"{everywhere.rank}.done").touch()
dist.destroy_process_group()
