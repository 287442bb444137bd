"""Two processes get the first one's masks and hold them, and measure what one process would."""

import pytest
import torch
from fits import trainer_of
from launch import HERE, together
from validating import Classifier, loader


@pytest.mark.parametrize("how", ["one_shot", "iterative"])
def test_two_ranks_get_rank_zeros_masks_and_hold_them(tmp_path, how):
    together(HERE / "ddp_script.py", tmp_path, how)
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


def test_every_rank_validates_all_batches(tmp_path):
    """A sum over examples, synchronised by torchmetrics, would count every example twice."""
    together(HERE / "validation_script.py", tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)
    expected = trainer_of([], tmp_path).validate(Classifier(), loader(), verbose=False)[0]
    assert first == second == pytest.approx(expected, rel=1e-6)
    assert (first["seen"], first["total"]) == (22, 22)
