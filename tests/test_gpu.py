"""What only a CUDA device can show. `make gpu`."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from prune_callbacks import (
    ALPS,
    MRP,
    NM,
    CausalLM,
    Gram,
    MaskEnforcer,
    OneShotPrune,
    SparseGPT,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.sparsity.selection import keep_largest
from prune_callbacks.tasks import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("pruner", [Wanda(NM(2, 4)), SparseGPT(Unstructured(0.5)), MRP(NM(1, 4))], ids=str)
def test_pruning_on_the_device_equals_pruning_on_the_cpu(pruner):
    batches = list(torch.randint(3, 200, (6, 64)).split(2))
    here, there = tiny_llama(hidden_size=64, layers=2), tiny_llama(hidden_size=64, layers=2)
    on_cpu = prune_sequentially(here, batches, pruner, progress=False)
    on_gpu = prune_sequentially(there, batches, pruner, device="cuda", progress=False)
    assert {p.device.type for p in there.parameters()} == {"cpu"}
    for name in on_cpu.masks:
        # Sums in another order: scores that are nearly equal may change places.
        assert (on_cpu.masks[name] == on_gpu.masks[name]).float().mean() > 0.99
    assert on_gpu.sparsity == on_cpu.sparsity
    assert on_gpu.peak_memory_bytes < 1e9


@pytest.mark.parametrize("make", [MRP, ALPS, lambda p: MRP(p, "MM"), lambda p: MRP(p, "MS")])
def test_losses_on_the_device_are_those_of_the_cpu(make):
    """Products in bfloat16 there and maybe not here: masks may differ a little, what they cost may not."""
    x = torch.randn(4000, 512) @ torch.randn(512, 512).mul_(torch.arange(1, 513) ** -0.4)
    weight, losses = torch.randn(256, 512), []
    for device in ("cpu", "cuda"):
        gram = Gram(512, device)
        gram.update(x.to(device))
        pruned = make(NM(2, 4)).prune(weight.to(device), gram)
        assert pruned.weight.device.type == device
        losses.append(pruned.loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_selection_on_the_device_breaks_ties_as_on_the_cpu():
    scores = torch.randint(0, 5, (64, 256)).float()
    assert torch.equal(keep_largest(scores.cuda(), 100).cpu(), keep_largest(scores, 100))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_zeros_hold_on_the_device(precision, tmp_path):
    data = torch.randint(3, 200, (40, 32))
    module = CausalLM(tiny_llama(hidden_size=64, layers=2), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    one_shot, enforcer = OneShotPrune(SparseGPT(NM(2, 4)), data.split(4), progress=False), MaskEnforcer()
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_steps=10,
        gradient_clip_val=0.5,
        callbacks=[one_shot, enforcer],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, 4))
    assert enforcer.masks.violations(module.named_parameters()) == {}
