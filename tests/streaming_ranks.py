"""Run by tests as several processes that prune one checkpoint from files into files together."""

import json
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from prune_callbacks import (
    MRP,
    NM,
    BlockReconstruction,
    Magnitude,
    SparseGPT,
    SparseGPTQ,
    Unstructured,
    Wanda,
    prune_checkpoint,
    writing,
)
from prune_callbacks.ranks import EverywhereError, Ranks
from prune_callbacks.streaming import together, walk

CASES = {
    "sparsegpt": (SparseGPT(Unstructured(0.5)), {}),
    "mrp": (MRP(NM(2, 4), block_size=None), {}),
    "rounded": (SparseGPTQ(NM(2, 4)), {}),
    "magnitude": (Magnitude(Unstructured(0.5)), {}),
    "reconstructed": (Wanda(NM(2, 4)), {"reconstruction": BlockReconstruction(passes=2, learning_rate=0.005)}),
}


def given(folder):
    return list(torch.load(folder / "batches.pt"))


def prune(folder, target, case, ranks, batches=None, **settings):
    pruner, further = CASES[case]
    batches = given(folder) if batches is None else batches
    return prune_checkpoint(
        folder / "source", folder / target, pruner, batches, progress=False, ranks=ranks, **(further | settings)
    )


def equal(folder, ranks):
    for case in CASES:
        report = prune(folder, f"{case}_together", case, ranks)
        assert len({json.dumps(one) for one in ranks.gather(report)}) == 1
        assert prune(folder, f"{case}_together", case, ranks) == report  # a finished one is not made again
    prune(folder, "one_batch", "sparsegpt", ranks, given(folder)[:1])


def kill(folder, ranks):
    """Prunes slowly, so that whoever kills a rank has time to."""
    rename = writing.rename

    def slow(*names, **durable):
        time.sleep(0.05)
        rename(*names, **durable)

    writing.rename = slow
    for module in [module for name, module in sys.modules.items() if name.startswith("prune_callbacks.streaming")]:
        if hasattr(module, "rename"):
            module.rename = slow
    prune(folder, "killed", "sparsegpt", ranks)


def refused(folder, ranks):
    """Checks that every rank gets an error, whichever of them has the reason, and that nothing is lost."""
    second = ranks.rank == 1

    def fails(text, target="refused", **settings):
        with pytest.raises(ValueError, match=text):
            prune(folder, target, "sparsegpt", ranks, **settings)

    fails("min_expert_tokens was 32 and is 8", min_expert_tokens=8 if second else 32)
    other = BlockReconstruction() if second else None
    fails("called on rank 1 with another setting than on rank 0: .*reconstruction was None", reconstruction=other)
    fails("called on rank 1 with another setting than on rank 0: batches", batches=given(folder)[: 2 if second else 3])
    together.PATIENCE = 0.5
    elsewhere = folder / "elsewhere" if second else folder
    if second:
        shutil.copytree(folder / "source", elsewhere / "source", dirs_exist_ok=True)
        for path in (folder / "source").iterdir():  # the same content and times
            shutil.copystat(path, elsewhere / "source" / path.name)
        shutil.copy(folder / "batches.pt", elsewhere)
    with pytest.raises(ValueError, match="all ranks must share one folder") as found:
        prune(elsewhere, "refused", "sparsegpt", ranks)
    assert str(found.value).startswith("rank 1: ") is not second
    # A disk that is full for one rank alone, in the second block.
    from prune_callbacks.streaming import inputs

    write, count = inputs.write_tensors, [0]

    def full(*arguments):
        count[0] += 1
        if second and count[0] == 3:  # of its windows in the first capture, then behind the blocks
            raise ValueError("the disk is full here")
        write(*arguments)

    inputs.write_tensors = full
    fails("the disk is full here")
    inputs.write_tensors = write
    ranks.first(lambda: None)
    assert len(list((folder / "refused/streaming").glob("block_*.json"))) == 1  # the first is kept
    # Hidden states of the second rank that are gone when the second block is pruned.
    collect, blocks = walk.collect, []

    def without_a_file(make, index, block, targets, given, *arguments):
        blocks.append(index)
        if second and index == 1:
            given[0].path.rename(given[0].path.with_suffix(".away"))
        return collect(make, index, block, targets, given, *arguments)

    walk.collect = without_a_file
    fails("00001.safetensors, with hidden states that enter a block, is missing or damaged")
    assert blocks == [1]
    walk.collect = collect
    for path in (folder / "refused/streaming").rglob("*.away") if second else ():
        path.rename(path.with_suffix(".safetensors"))
    ranks.first(lambda: None)
    report = prune(folder, "refused", "sparsegpt", ranks)
    assert len(report["reconstruction_loss"]) == 21
    prune(folder, "few", "reconstructed", ranks, given(folder)[:1])  # two windows, of which one is held out
    shares(ranks)
    warned(folder, ranks)


def shares(ranks):
    """What every rank hears when others fail, and what the first one gives to all."""

    def fail(error):
        raise error

    together_error = EverywhereError("for all")
    for errors, expected in (
        ({0: together_error}, {0: EverywhereError, 1: EverywhereError}),
        ({0: ValueError("mine"), 1: together_error}, {0: EverywhereError, 1: EverywhereError}),
        ({1: KeyError("mine")}, {0: ValueError, 1: KeyError}),
    ):
        with pytest.raises(expected[ranks.rank]) as found:
            ranks.attempt(lambda e=errors: fail(e[ranks.rank]) if ranks.rank in e else None)
        assert type(found.value) is expected[ranks.rank]
    assert ranks.first(lambda: ranks.rank + 5) == 5
    assert ranks.first(lambda: None) is None
    with pytest.raises(ValueError, match="^(rank 0: )?no room$"):
        ranks.first(lambda: fail(ValueError("no room")))


def warned(folder, ranks):
    """A warning of the second rank alone is in the report."""
    original = ranks.gather

    class Heard(Ranks):
        def gather(self, value):
            self.calls += 1
            if self.rank == 1 and self.calls == 12:  # in the midst of the blocks
                warnings.warn("only the second rank says this", stacklevel=1)
            return original(value)

    heard = Heard(dist.group.WORLD)
    heard.calls = 0
    report = prune(folder, "warned", "magnitude", heard)
    assert report["warnings"] == ["only the second rank says this"]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    globals()[sys.argv[1]](Path(sys.argv[2]), Ranks(dist.group.WORLD))
    dist.destroy_process_group()
