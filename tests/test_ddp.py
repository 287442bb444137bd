import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("how", ["one_shot", "iterative"])
def test_two_ranks_get_rank_zeros_masks_and_hold_them(tmp_path, how):
    script = Path(__file__).with_name("ddp_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["steps"] == second["steps"] == 5
    assert first["violations"] == second["violations"] == {}
    assert len(first["masks"]) == 14
    if how == "iterative":
        counts = [(int(mask.sum()), mask.numel()) for mask in first["masks"].values()]
        assert 2 * sum(kept for kept, _ in counts) == sum(total for _, total in counts)
    for name, mask in first["masks"].items():
        assert float(mask.float().mean()) == 0.5 or how == "iterative"
        assert torch.equal(mask, second["masks"][name])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
