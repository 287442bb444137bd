"""What only a CUDA device can show. `make gpu`."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from prune_callbacks import (
    ALPS,
    GPTQ,
    MRP,
    NM,
    CausalLM,
    Columns,
    Gram,
    Grid,
    IMPSchedule,
    IterativePrune,
    LoRARecovery,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    QuantizeWeights,
    Rewind,
    SparseGPT,
    SparseGPTQ,
    SquareHead,
    Structured,
    Unstructured,
    Wanda,
    load_compressed,
    permute_channels_,
    prune_checkpoint,
    prune_sequentially,
    save_compressed,
    shrink,
)
from prune_callbacks.parallel.packed import PackedKeep, zero_removed
from prune_callbacks.sparsity.selection import keep_largest, keep_largest_of_all
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


@pytest.mark.parametrize(
    "pruner",
    [
        Wanda(NM(2, 4)),
        SparseGPT(Unstructured(0.5)),
        MRP(NM(1, 4)),
        MRP(NM(2, 4), "MM"),
        ALPS(NM(2, 4)),
        Structured(Columns(0.25)),
        GPTQ(Wanda(NM(2, 4)), Grid(4, 32)),
        GPTQ(SparseGPT(NM(2, 4)), Grid(4, 32)),
        SparseGPTQ(NM(2, 4), Grid(4, 32)),
    ],
    ids=repr,
)
def test_a_weight_on_the_cpu_is_solved_for_where_its_statistic_is(pruner):
    x = torch.randn(2000, 128, device="cuda") @ torch.randn(128, 128, device="cuda")
    statistic = pruner.statistic(128, "cuda")
    statistic.update(x)
    weight = torch.randn(64, 128)
    mixed, there = pruner.prune(weight, statistic), pruner.prune(weight.cuda(), statistic)
    for part in ("weight", "keep", "scale"):
        if (value := getattr(mixed, part)) is not None:
            assert value.device.type == "cpu"
            assert torch.equal(value, getattr(there, part).cpu())
    assert mixed.loss == there.loss


@pytest.mark.parametrize("overlapping", [True, False])
def test_streaming_to_the_device_is_what_pruning_there_makes(tmp_path, monkeypatch, overlapping):
    monkeypatch.setattr("prune_callbacks.calibration.prefetch.overlaps", lambda where: overlapping)
    batches = list(torch.randint(3, 200, (6, 64)).split(2))
    model = tiny_llama(hidden_size=64, layers=4)
    model.save_pretrained(tmp_path / "source")
    report = prune_sequentially(model, batches, SparseGPT(Unstructured(0.5)), device="cuda", progress=False)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    prune_checkpoint(
        tmp_path / "source",
        tmp_path / "target",
        SparseGPT(Unstructured(0.5)),
        batches,
        device="cuda",
        progress=False,
    )
    streamed = type(model).from_pretrained(tmp_path / "target/model").state_dict()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in model.state_dict().items())
    assert MaskSet.load(tmp_path / "target/masks.safetensors") == report.masks


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SparseGPTQ(p, Grid(4, 128)),
        lambda p: GPTQ(SparseGPT(p), Grid(4, None)),
        lambda p: Structured(Columns(0.25)),
    ],
)
def test_rounding_and_structured_losses_on_the_device_are_those_of_the_cpu(make):
    x = torch.randn(4000, 256) @ torch.randn(256, 256).mul_(torch.arange(1, 257) ** -0.4)
    weight, losses = torch.randn(128, 256), []
    for device in ("cpu", "cuda"):
        gram = Gram(256, device)
        gram.update(x.to(device))
        pruned = make(NM(2, 4)).prune(weight.to(device), gram)
        assert pruned.weight.device.type == device
        losses.append(pruned.loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_permuting_on_the_device_keeps_the_logits_and_the_gain(tmp_path):
    batches = list(torch.randint(3, 200, (6, 64)).split(2))
    model = tiny_llama(hidden_size=64, layers=2).eval()
    with torch.no_grad():
        before = model(batches[0]).logits
        there = permute_channels_(model, batches, NM(2, 4), device="cuda", progress=False)
        torch.testing.assert_close(model(batches[0]).logits, before, rtol=1e-4, atol=1e-4)
    here = permute_channels_(tiny_llama(hidden_size=64, layers=2), batches, NM(2, 4), progress=False)
    for name, gain in here.items():
        assert there[name].before == pytest.approx(gain.before, rel=1e-3)
        assert there[name].after == pytest.approx(gain.after, rel=0.02)


def test_packed_files_of_a_model_on_the_device(tmp_path):
    batches = list(torch.randint(3, 200, (6, 64)).split(2))
    model = tiny_llama(hidden_size=64, layers=2).cuda()
    report = prune_sequentially(model, batches, SparseGPTQ(NM(2, 4), Grid(4, 32)), progress=False)
    save_compressed(model, report.masks, tmp_path / "a", pattern=NM(2, 4), scales=report.scales, grid=Grid(4, 32))
    state = load_compressed(tmp_path / "a").state_dict()
    assert all(torch.equal(state[name], tensor.cpu()) for name, tensor in model.state_dict().items())
    structured = prune_sequentially(model, batches, Structured(Columns(0.25)), progress=False)
    smaller = shrink(model, structured.masks)
    assert next(smaller.parameters()).is_cuda
    with torch.no_grad():
        logits = [one.eval()(batches[0].cuda()).logits for one in (model, smaller)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


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


def test_selection_over_tensors_on_the_device_is_that_of_the_cpu():
    scores = {str(i): torch.randint(0, 50, (64, 32)).float() for i in range(3)}
    there = dict(keep_largest_of_all({name: values.cuda() for name, values in scores.items()}, 1000))
    for name, keep in keep_largest_of_all(scores, 1000):
        assert torch.equal(there[name].cpu(), keep)


def fit(callbacks, precision, folder, objective=None, strategy="auto"):
    data = torch.randint(3, 200, (40, 32))
    model = tiny_llama(hidden_size=64, layers=2)
    module = CausalLM(model, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), objective=objective)
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        strategy=strategy,
        precision=precision,
        max_steps=10,
        gradient_clip_val=0.5,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, 4))
    return module


def one_shot():
    return OneShotPrune(SparseGPT(NM(2, 4)), torch.randint(3, 200, (40, 32)).split(4), progress=False)


PRECISIONS = pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])


@PRECISIONS
def test_zeros_hold_on_the_device(precision, tmp_path):
    enforcer = MaskEnforcer()
    module = fit([one_shot(), enforcer], precision, tmp_path)
    assert enforcer.masks.violations(module.named_parameters()) == {}


@PRECISIONS
def test_rounds_and_rewinding_on_the_device(precision, tmp_path):
    enforcer = MaskEnforcer()
    prune = IterativePrune(IMPSchedule(0.9, rounds=3, every=2), rewind=Rewind(1))
    module = fit([prune, enforcer], precision, tmp_path)
    assert enforcer.masks.sparsity() == pytest.approx(0.9, abs=1e-4)
    assert enforcer.masks.violations(module.named_parameters()) == {}


@PRECISIONS
def test_masked_lora_and_a_teacher_on_the_device(precision, tmp_path):
    enforcer = MaskEnforcer()
    teacher = SquareHead(tiny_llama(hidden_size=64, layers=2), dtype="bfloat16")
    module = fit([one_shot(), LoRARecovery(), enforcer], precision, tmp_path, teacher)
    assert next(teacher.teacher.model.parameters()).device.type == "cuda"
    assert enforcer.masks.violations(module.named_parameters()) == {}
    assert not [name for name in module.state_dict() if "lora" in name]


def test_packed_masks_on_the_device_are_those_of_the_cpu():
    keep = torch.rand(1001) > 0.5
    packed = MaskSet({"a": keep}).packed("a")
    values = torch.randn(1001 - 13, device="cuda", dtype=torch.bfloat16)
    there = PackedKeep(packed, 13, 1001, torch.device("cuda"))
    zero_removed(values, there.unpacked())
    assert torch.equal(there.unpacked().cpu(), keep[13:])
    assert torch.equal(values.cpu() != 0, keep[13:])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("offload", [{}, {"offload_optimizer": {"device": "cpu", "pin_memory": True}}], ids=["", "cpu"])
def test_zeros_hold_in_the_masters_of_zero_on_the_device(offload, precision, stage, tmp_path):
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    class Look(Callback):
        worst = 0.0

        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, parameter in pl_module.model.named_parameters():
                if name in enforcer.masks:
                    removed = ~enforcer.masks[name].cuda()
                    values = [safe_get_full_fp32_param(parameter)]
                    values += [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
                    self.worst = max(self.worst, *(float((v * removed.to(v.device)).abs().max()) for v in values))

    enforcer, look = MaskEnforcer(), Look()
    config = {"zero_optimization": {"stage": stage} | offload, "zero_allow_untested_optimizer": True}
    config["zero_force_ds_cpu_optimizer"] = False
    prune = IterativePrune(IMPSchedule(0.75, rounds=2, every=3), rewind=Rewind(1))
    for first in ([one_shot()], [prune]):
        fit([*first, enforcer, look], precision, tmp_path, strategy=DeepSpeedStrategy(config=dict(config)))
        assert look.worst == 0
        assert enforcer.masks.sparsity() >= 0.5


def test_zeros_hold_under_fsdp2_on_the_device(tmp_path):
    enforcer = MaskEnforcer()
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    module = fit([one_shot(), enforcer], "bf16-mixed", tmp_path, strategy=strategy)
    whole = {name: parameter.full_tensor() for name, parameter in module.named_parameters()}
    assert enforcer.masks.violations(whole) == {}


def test_rounding_at_the_end_of_a_fit(tmp_path):
    """Lightning has moved the module to the CPU by then; scales and codes come together on it."""
    batches = list(torch.randint(3, 200, (6, 64)).split(2))
    quantize = QuantizeWeights(tmp_path, Grid(4, 32), batches=batches, progress=False)
    prune = OneShotPrune(Wanda(NM(2, 4)), batches, progress=False)
    module = fit([prune, MaskEnforcer(), quantize], "32-true", tmp_path)
    loaded = load_compressed(tmp_path / "compressed").state_dict()
    assert all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in module.model.state_dict().items())
    assert prune.report.masks.violations(module.model.named_parameters()) == {}
