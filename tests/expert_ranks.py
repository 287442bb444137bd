"""Run by a test as two processes: models pruned by both together, and by one alone: experts, and blocks in no chain."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_experts import PRUNERS, model_of, pruned, unreachable
from test_topologies import NAMES, residual_outside
from topologies import made, rerun_masks

from prune_callbacks import Unstructured, Wanda, prune_sequentially
from prune_callbacks.ranks import ALONE, Ranks

dist.init_process_group("gloo")
everywhere = Ranks(dist.group.WORLD)
torch.manual_seed(0)
windows = list(torch.randint(3, 61, (6, 5)).split(1))  # few enough for experts that one rank alone reaches
results = {}
for family in ("mixtral", "gpt-oss"):
    for label, pruner in PRUNERS.items():
        model, alone = (unreachable(model_of(family), 3) for _ in range(2))
        mine = windows[:2] if everywhere.rank == 0 else windows[2:]
        report = pruned(model, mine, pruner, ranks=everywhere, min_expert_tokens=4)
        single = pruned(alone, windows, pruner, ranks=ALONE, min_expert_tokens=4)
        assert report.by_magnitude == single.by_magnitude, (report.by_magnitude, single.by_magnitude)
        assert report.masks == single.masks
        results[f"{family} {label}"] = {
            "shared": dict(model.state_dict()),
            "alone": dict(alone.state_dict()),
            "counts": report.by_magnitude,
        }
batches = list(torch.randint(0, 23, (6, 9)).split(2))
expected = rerun_masks(made(residual_outside), NAMES, batches)
for share in (slice(everywhere.rank, None, 2), slice(0, 3 * (1 - everywhere.rank))):  # in turns; all on the first
    whole = made(residual_outside)
    report = prune_sequentially(whole, batches[share], Wanda(Unstructured(0.5)), progress=False, ranks=everywhere)
    assert report.masks.keys() == expected.keys()
    assert all(torch.equal(report.masks[name], keep) for name, keep in expected.items())
    assert report.masks.violations(whole.named_parameters()) == {}
torch.save(results, Path(sys.argv[1]) / f"{everywhere.rank}.pt")
dist.destroy_process_group()
