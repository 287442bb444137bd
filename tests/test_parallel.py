"""Masks, rounds, pruning and checkpoints under every strategy, in two real processes over gloo."""

import subprocess
import sys

import cpu_strategies
import pytest
import torch
from launch import ALONE, fits, run
from lightning.pytorch import Callback
from rank_fits import STRATEGIES, Module, batches, half_masks, trainer_of

from prune_callbacks import LoRARecovery, MaskEnforcer, MaskSet
from prune_callbacks.parallel.checkpoints import open_checkpoint

PRECISIONS = ("32-true", "bf16-mixed")
KINDS = {"weight", "master", "exp_avg", "exp_avg_sq"}
RANKS = (0, 1)
by_strategy = pytest.mark.parametrize("name", STRATEGIES)


def loaded(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    fits("hold", folder, *STRATEGIES)
    fits("hold_alone", folder, launcher=ALONE)
    return folder


def all_zero(worst):
    assert len(worst) == 12
    return all(row == dict.fromkeys(KINDS, 0.0) for row in worst)


@by_strategy
@pytest.mark.parametrize("precision", PRECISIONS)
def test_after_every_step_weights_masters_and_moments_are_zero(held, name, precision):
    for rank in RANKS:
        result = loaded(held, f"{name}_{precision}_held_{rank}")
        assert all_zero(result["worst"])
        assert result["logged"]["violations"] == 0


@by_strategy
@pytest.mark.parametrize("precision", PRECISIONS)
def test_control_without_the_enforcer_they_come_back_at_once(held, name, precision):
    worst = loaded(held, f"{name}_{precision}_free_0")["worst"]
    assert all(row["weight"] > 5e-3 and row["master"] > 5e-3 and row["exp_avg"] > 1e-4 for row in worst)
    assert worst[-1]["weight"] > 5 * worst[0]["weight"]


def losses(folder, name):
    return torch.tensor([loaded(folder, f"{name}_{rank}")["losses"] for rank in RANKS]).mean(0)


def test_the_losses_of_ddp_are_those_of_one_process(held):
    alone = torch.tensor(loaded(held, "auto_32-true_held_0")["losses"])
    torch.testing.assert_close(losses(held, "ddp_32-true_held"), alone, atol=1e-5, rtol=0)
    free = torch.tensor(loaded(held, "auto_32-true_free_0")["losses"])
    assert (alone - free).abs().max() > 1e-3  # the curve tells masks from none


@pytest.mark.parametrize("name", STRATEGIES[1:])
def test_the_losses_of_sharded_strategies_are_those_of_ddp(held, name):
    torch.testing.assert_close(
        losses(held, f"{name}_32-true_held"), losses(held, "ddp_32-true_held"), atol=1e-5, rtol=0
    )


def test_zeros_of_experts_are_found_and_held_wherever_their_tensors_are(tmp_path):
    fits("experts", tmp_path, "ddp", "fsdp2", "zero3")
    for name in ("ddp", "fsdp2", "zero3"):
        result = loaded(tmp_path, f"{name}_1")
        assert len(result["worst"]) == 3
        assert all(row == dict.fromkeys(KINDS, 0.0) for row in result["worst"])
        assert sum(mask.ndim == 3 for mask in result["removed"].values()) == 4
        for place, zeros in result["zeros"].items():
            assert torch.equal(result["removed"][place.removeprefix("model.")], zeros)


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    fits("variants", folder)
    return folder


@pytest.mark.parametrize(
    "name", ["zero1_offload", "zero2_offload", "zero3_offload", "zero3_persistent", "zero3_subgroups"]
)
def test_wherever_deepspeed_keeps_its_masters_the_losses_are_the_same(held, variants, name):
    """With offloading, norms are taken before gradients can be masked: clipping would count the dead ones (1e-3)."""
    result = loaded(variants, f"{name}_0")
    assert all_zero(result["worst"])
    torch.testing.assert_close(losses(variants, name), losses(held, "ddp_32-true_held"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["zero2_frozen", "zero3_frozen"])
def test_frozen_layers_without_a_master_keep_their_zeros(variants, name):
    result = loaded(variants, f"{name}_1")
    assert all_zero(result["worst"])
    assert result["logged"]["violations"] == 0
    assert result["logged"]["sparsity"] == pytest.approx(0.5, abs=1e-4)


def test_whole_weights_are_written_and_read_wherever_they_are(tmp_path):
    fits("write", tmp_path, *STRATEGIES)
    found = [loaded(tmp_path, f"{name}_{rank}")["fractions"] for name in STRATEGIES for rank in RANKS]
    assert all(fractions == found[0] and set(fractions.values()) == {0.0} for fractions in found)


@pytest.fixture(scope="module")
def iterated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("iterated")
    fits("iterate", folder, *STRATEGIES)
    return folder


HOW = [("32-true", "on"), ("32-true", "back"), ("32-true", "weights"), ("bf16-mixed", "back")]


@by_strategy
@pytest.mark.parametrize(("precision", "rewind"), HOW)
def test_a_change_of_the_masks_in_the_middle_holds_like_any_other(iterated, name, precision, rewind):
    results = [loaded(iterated, f"{name}_{precision}_{rewind}_{rank}") for rank in RANKS]
    for result in results:
        assert all_zero(result["worst"])
        kept, total = (sum(f(mask) for mask in result["masks"].values()) for f in (torch.sum, torch.numel))
        assert kept == total // 4
        assert [all(k == 1 for k in row.values()) for row in result["kept"]] == [True] * 3 + [False] * 9
    assert all(torch.equal(mask, results[1]["masks"][n]) for n, mask in results[0]["masks"].items())


@pytest.mark.parametrize("name", STRATEGIES[1:])
@pytest.mark.parametrize("rewind", ["on", "back", "weights"])
def test_sharded_rounds_choose_and_rewind_as_ddp_does(iterated, name, rewind):
    """Every weight, so the embeddings too, which no mask touches: going back reached the masters."""
    ours, ddp = (loaded(iterated, f"{who}_32-true_{rewind}_0") for who in (name, "ddp"))
    assert all(torch.equal(mask, ddp["masks"][n]) for n, mask in ours["masks"].items())
    for n, weight in ours["weights"].items():
        torch.testing.assert_close(
            weight, ddp["weights"][n], atol=1e-5, rtol=0, msg=n
        )  # steps are a thousand times that
    torch.testing.assert_close(
        losses(iterated, f"{name}_32-true_{rewind}"), losses(iterated, f"ddp_32-true_{rewind}"), atol=1e-5, rtol=0
    )


def test_control_the_three_ways_to_go_on_differ(iterated):
    ends = [loaded(iterated, f"zero3_32-true_{rewind}_0")["losses"][-1] for rewind in ("on", "back", "weights")]
    assert min(abs(a - b) for a, b in zip(ends, ends[1:] + ends[:1], strict=True)) > 0.01


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    for precision in ("32-true", "64-true"):
        fits("one_shot", folder, precision)
        fits("one_shot", folder, precision, launcher=ALONE)
    return folder


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude", "structured", "permuted", "owl"])
def test_two_ranks_prune_as_one_does(pruned, pruner, precision):
    """Each with its share of the batches and of the layers, though the ranks began with other weights."""
    alone = loaded(pruned, f"{pruner}_{precision}_1_0")
    for rank in RANKS:
        ours = loaded(pruned, f"{pruner}_{precision}_2_{rank}")
        assert ours["layers"] == alone["layers"] == list(ours["masks"])
        assert all(torch.equal(mask, alone["masks"][n]) for n, mask in ours["masks"].items())
        for n, weight in ours["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][n], atol=1e-5, rtol=1e-5, msg=n)


def test_an_error_on_one_rank_ends_all_of_them(tmp_path):
    fits("fail", tmp_path)
    texts = [loaded(tmp_path, f"failed_{rank}")["error"] for rank in RANKS]
    assert all("layer model.layers.1.mlp.down_proj: the calibration activations hold NaN" in text for text in texts)
    assert sorted(text.startswith("rank ") for text in texts) == [False, True]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    fits("checkpoint", folder, *STRATEGIES)
    fits("resume", folder, *STRATEGIES)
    for name in STRATEGIES[2:]:  # what README says about another number of processes
        checkpoint = folder / f"{name}_on" / "step=5.ckpt"
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        run(*convert, "--input_folder", checkpoint / "checkpoint", "--output_folder", checkpoint / "universal")
    fits("resume_alone", folder, *STRATEGIES, launcher=ALONE)
    return folder


@by_strategy
def test_a_resumed_fit_ends_with_the_same_bits(resumed, name):
    for rank in RANKS:
        through = loaded(resumed, f"{name}_back/through_{rank}")
        again = loaded(resumed, f"{name}_back/resumed_on_2_{rank}")
        assert len(again["worst"]) == 7
        assert all(row == dict.fromkeys(KINDS, 0.0) for row in again["worst"])
        for part in ("masks", "weights"):
            assert all(torch.equal(value, again[part][n]) for n, value in through[part].items())


@by_strategy
def test_resuming_on_another_number_of_processes_keeps_the_masks(resumed, name):
    through, again = loaded(resumed, f"{name}_on/through_0"), loaded(resumed, f"{name}_on/resumed_on_1_0")
    assert all(row == dict.fromkeys(KINDS, 0.0) for row in again["worst"])
    assert all(torch.equal(mask, again["masks"][n]) for n, mask in through["masks"].items())
    for n, weight in through["weights"].items():
        torch.testing.assert_close(again["weights"][n], weight, atol=2e-6, rtol=0, msg=n)


@by_strategy
def test_a_checkpoint_is_read_weight_by_weight_and_is_sparse(resumed, name):
    path = resumed / f"{name}_on" / "step=5.ckpt"
    checkpoint = open_checkpoint(path)
    weights = {n: checkpoint.read(n) for n in checkpoint.names()}
    masks = MaskSet.from_state_dict(checkpoint.callbacks["MaskEnforcer"]["masks"])
    assert checkpoint.step == 5
    assert masks.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert masks.violations(weights) == {}
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in Module().state_dict().items()}
    if name.startswith("zero"):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        theirs = get_fp32_state_dict_from_zero_checkpoint(str(path))
        assert theirs.keys() <= weights.keys()
        assert all(torch.equal(weights[n], weight) for n, weight in theirs.items())
        assert masks.violations(theirs) == {}


def test_what_cannot_be_served_is_refused_with_what_to_use(tmp_path):
    nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}
    for strategy, message in (
        (cpu_strategies.strategy_of("zero0"), r"with ZeRO stage 0; use stage 1, 2 or 3"),
        (cpu_strategies.CPUDeepSpeedStrategy(config=nvme), "offload_optimizer on NVMe.*offload to the CPU instead"),
        (
            cpu_strategies.CPUDeepSpeedStrategy(
                config={"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
            ),
            "zero_hpz_partition_size",
        ),
        (cpu_strategies.ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), "tensor_parallel_size=1"),
    ):
        trainer = trainer_of(strategy, tmp_path, [], devices=1)
        with pytest.raises(ValueError, match=message):
            MaskEnforcer().setup(trainer, Module(), "fit")
    trainer = trainer_of(cpu_strategies.strategy_of("zero2"), tmp_path, [], devices=1)
    with pytest.raises(ValueError, match=r"LoRARecovery does not work under CPUDeepSpeedStrategy; use one device or"):
        LoRARecovery().setup(trainer, Module(), "fit")


def test_nothing_of_deepspeed_is_imported_before_it_is_used():
    code = "import sys, prune_callbacks.callbacks, prune_callbacks.parallel; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_masks_on_the_cpu_are_the_packed_bits_themselves(tmp_path):
    """At rest, one bit a weight: the access to whole parameters makes no copy of them."""
    module = Module()
    masks, enforcer = half_masks(module), MaskEnforcer()
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, *_):
            seen.update({name: keep._bits.data_ptr() for name, keep in enforcer._access._keep.items()})

    enforcer.given = masks
    trainer = trainer_of("auto", tmp_path, [enforcer, Look()], devices=1, max_steps=1)
    trainer.fit(module, datamodule=batches())
    assert seen == {name: masks.packed(name).data_ptr() for name in masks}
