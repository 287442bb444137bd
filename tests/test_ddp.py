import os
import subprocess
import sys
from pathlib import Path

import torch


def test_two_ranks_get_rank_zeros_masks_and_hold_them(tmp_path):
    script = Path(__file__).with_name("ddp_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
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
    for name, mask in first["masks"].items():
        assert float(mask.float().mean()) == 0.5
        assert torch.equal(mask, second["masks"][name])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
