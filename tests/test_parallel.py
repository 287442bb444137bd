"""Masks, rounds, pruning and checkpoints under every strategy, in two real processes over gloo."""

from importlib.util import find_spec

import cpu_strategies
import pytest
import torch
from launch import ended, fits, good
from lightning.pytorch import Callback
from rank_fits import PRUNERS, STRATEGIES, Module, batches, half_masks, trainer_of
from tiers import slow

from prune_callbacks import LoRARecovery, MaskEnforcer, MaskSet
from prune_callbacks.storage.checkpoints import open_checkpoint

KINDS = {"weight", "master", "exp_avg", "exp_avg_sq"}
RANKS = (0, 1)
by_strategy = pytest.mark.parametrize("name", STRATEGIES)
HELD = [
    *((name, "32-true", 8) for name in STRATEGIES),
    *((name, "bf16-mixed", 4) for name in STRATEGIES),
    *(slow(name, "bf16-mixed", 12) for name in STRATEGIES),
]


def loaded(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


class Scenarios:
    """Results of a scenario of rank_fits.py, which is run when they are first asked for."""

    def __init__(self, folder, scenario):
        self.folder = folder
        self.scenario = scenario
        self._made = set()

    def __call__(self, *arguments, world_size=2):
        if (arguments, world_size) not in self._made:
            fits(self.scenario, self.folder, *arguments, world_size=world_size)
            self._made.add((arguments, world_size))
        return self.folder


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    run = Scenarios(tmp_path_factory.mktemp("held"), "hold")

    def results(name, precision="32-true", steps=8, how="held"):
        ranks = (0,) if name == "auto" else RANKS
        folder = run(name, precision, steps, world_size=len(ranks))
        return [loaded(folder, f"{name}_{precision}_{steps}_{how}_{rank}") for rank in ranks]

    return results


def all_zero(worst, steps=8):
    assert len(worst) == steps
    return all(row == dict.fromkeys(KINDS, 0.0) for row in worst)


@pytest.mark.parametrize(("name", "precision", "steps"), HELD)
def test_after_every_step_weights_masters_and_moments_are_zero(held, name, precision, steps):
    for result in held(name, precision, steps):
        assert all_zero(result["worst"], steps)
        assert result["logged"]["violations"] == 0


@pytest.mark.parametrize(("name", "precision", "steps"), HELD)
def test_control_without_the_enforcer_they_come_back_at_once(held, name, precision, steps):
    worst = held(name, precision, steps, "free")[0]["worst"]
    assert all(row["weight"] > 5e-3 and row["master"] > 5e-3 and row["exp_avg"] > 1e-4 for row in worst)
    assert worst[-1]["weight"] > steps / 2.4 * worst[0]["weight"]


def losses(results):
    return torch.tensor([result["losses"] for result in results]).mean(0)


def test_the_losses_of_ddp_are_those_of_one_process(held):
    alone = losses(held("auto"))
    torch.testing.assert_close(losses(held("ddp")), alone, atol=1e-5, rtol=0)
    assert (alone - losses(held("auto", how="free"))).abs().max() > 1e-3  # the curve tells masks from none


@pytest.mark.parametrize("name", STRATEGIES[1:])
def test_the_losses_of_sharded_strategies_are_those_of_ddp(held, name):
    torch.testing.assert_close(losses(held(name)), losses(held("ddp")), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_zeros_of_experts_are_found_and_held_wherever_their_tensors_are(tmp_path, name):
    fits("experts", tmp_path, name)
    result = loaded(tmp_path, f"{name}_1")
    assert all_zero(result["worst"], steps=3)
    assert sum(mask.ndim == 3 for mask in result["removed"].values()) == 4
    for place, zeros in result["zeros"].items():
        assert torch.equal(result["removed"][place.removeprefix("model.")], zeros)


@pytest.mark.parametrize(
    "name",
    [
        slow("zero1_offload"),
        "zero2_offload",
        "zero3_offload",
        slow("zero3_persistent"),
        "zero3_subgroups",
    ],
)
def test_wherever_deepspeed_keeps_its_masters_the_losses_are_the_same(held, tmp_path, name):
    """With offloading, norms are taken before gradients can be masked: clipping would count the dead ones (1e-3)."""
    fits("variant", tmp_path, name)
    results = [loaded(tmp_path, f"{name}_{rank}") for rank in RANKS]
    assert all_zero(results[0]["worst"])
    torch.testing.assert_close(losses(results), losses(held("ddp")), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [slow("zero2_frozen"), "zero3_frozen"])
def test_frozen_layers_without_a_master_keep_their_zeros(tmp_path, name):
    fits("variant", tmp_path, name)
    result = loaded(tmp_path, f"{name}_1")
    assert all_zero(result["worst"])
    assert result["logged"]["violations"] == 0
    assert result["logged"]["sparsity"] == pytest.approx(0.5, abs=1e-4)


@by_strategy
def test_whole_weights_are_written_and_read_wherever_they_are(tmp_path, name):
    fits("write", tmp_path, name)
    wanted = dict.fromkeys(half_masks(Module()), 0.0)
    assert [loaded(tmp_path, f"{name}_{rank}")["fractions"] for rank in RANKS] == [wanted, wanted]


@pytest.fixture(scope="module")
def iterated(tmp_path_factory):
    run = Scenarios(tmp_path_factory.mktemp("iterated"), "iterate")

    def results(name, precision, rewind):
        folder = run(name, precision, rewind)
        return [loaded(folder, f"{name}_{precision}_{rewind}_{rank}") for rank in RANKS]

    return results


HOW = [
    *(("32-true", "back", name) for name in STRATEGIES),
    ("32-true", "on", "ddp"),
    *(slow("32-true", "on", name) for name in ("fsdp2", "zero1", "zero2", "zero3")),
    *(slow(*how, name) for how in (("32-true", "weights"), ("bf16-mixed", "back")) for name in STRATEGIES),
]


@pytest.mark.parametrize(("precision", "rewind", "name"), HOW)
def test_a_change_of_the_masks_in_the_middle_holds_like_any_other(iterated, name, precision, rewind):
    results = iterated(name, precision, rewind)
    for result in results:
        assert all_zero(result["worst"], steps=12)
        kept, total = (sum(f(mask) for mask in result["masks"].values()) for f in (torch.sum, torch.numel))
        assert kept == total // 4
        assert [all(k == 1 for k in row.values()) for row in result["kept"]] == [True] * 3 + [False] * 9
    assert all(torch.equal(mask, results[1]["masks"][n]) for n, mask in results[0]["masks"].items())


@pytest.mark.parametrize(
    ("rewind", "name"),
    [
        *(("back", name) for name in STRATEGIES[1:]),
        ("on", "zero3"),
        *(slow("on", name) for name in STRATEGIES[1:-1]),
        *(slow("weights", name) for name in STRATEGIES[1:]),
    ],
)
def test_sharded_rounds_choose_and_rewind_as_ddp_does(iterated, name, rewind):
    """Every weight, so the embeddings too, which no mask touches: going back reached the masters."""
    ours, ddp = (iterated(who, "32-true", rewind) for who in (name, "ddp"))
    assert all(torch.equal(mask, ddp[0]["masks"][n]) for n, mask in ours[0]["masks"].items())
    for n, weight in ours[0]["weights"].items():  # steps are a thousand times the tolerance
        torch.testing.assert_close(weight, ddp[0]["weights"][n], atol=1e-5, rtol=0, msg=n)
    torch.testing.assert_close(losses(ours), losses(ddp), atol=1e-5, rtol=0)


def test_control_the_three_ways_to_go_on_differ(iterated):
    ends = [iterated("ddp", "32-true", rewind)[0]["losses"][-1] for rewind in ("on", "back", "weights")]
    assert min(abs(a - b) for a, b in zip(ends, ends[1:] + ends[:1], strict=True)) > 0.01


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    run = Scenarios(tmp_path_factory.mktemp("pruned"), "one_shot")

    def results(pruner, precision):
        run(precision, world_size=1)
        folder = run(precision)
        return [loaded(folder, f"{pruner}_{precision}_{which}") for which in ("1_0", "2_0", "2_1")]

    return results


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_two_ranks_prune_as_one_does(pruned, pruner, precision):
    """Each with its share of the batches and of the layers, though the ranks began with other weights."""
    alone, *both = pruned(pruner, precision)
    for ours in both:
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
    """The folder of a strategy's rounds, run through and resumed from the checkpoint of the fifth step."""
    folder = tmp_path_factory.mktemp("resumed")
    run, again = Scenarios(folder, "checkpoint"), Scenarios(folder, "resume")

    def results(name, rewind, world_size):
        run(name, rewind)
        checkpoint = folder / f"{name}_{rewind}" / "step=5.ckpt"
        if world_size == 1 and name.startswith("zero"):  # what README says about another number of processes
            universal(checkpoint / "checkpoint")
        if world_size is not None:
            again(name, rewind, world_size=world_size)
        return folder / f"{name}_{rewind}"

    return results


def universal(checkpoint):
    """DeepSpeed's own command, once."""
    target = checkpoint.with_name("universal")
    if not target.exists():
        script = find_spec("deepspeed.checkpoint.ds_to_universal").origin
        good(ended(script, "--inject_missing_state", "--input_folder", checkpoint, "--output_folder", target))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", slow("zero1"), "zero2", "zero3"])
def test_a_resumed_fit_ends_with_the_same_bits(resumed, name):
    folder = resumed(name, "back", 2)
    for rank in RANKS:
        through, again = loaded(folder, f"through_{rank}"), loaded(folder, f"resumed_on_2_{rank}")
        assert all_zero(again["worst"], steps=7)
        for part in ("masks", "weights"):
            assert all(torch.equal(value, again[part][n]) for n, value in through[part].items())


@pytest.mark.parametrize("name", ["ddp", "fsdp2", slow("zero1"), slow("zero2"), "zero3"])
def test_resuming_on_another_number_of_processes_keeps_the_masks(resumed, name):
    folder = resumed(name, "on", 1)
    through, again = loaded(folder, "through_0"), loaded(folder, "resumed_on_1_0")
    assert all_zero(again["worst"], steps=7)
    assert all(torch.equal(mask, again["masks"][n]) for n, mask in through["masks"].items())
    for n, weight in through["weights"].items():
        torch.testing.assert_close(again["weights"][n], weight, atol=2e-6, rtol=0, msg=n)


@by_strategy
def test_a_checkpoint_is_read_weight_by_weight_and_is_sparse(resumed, name):
    path = resumed(name, "back", None) / "step=5.ckpt"
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


def test_masks_on_the_cpu_are_the_packed_bits_themselves(tmp_path):
    """At rest, one bit a weight: the access to whole parameters makes no copy of them."""
    module = Module()
    masks, enforcer = half_masks(module), MaskEnforcer()
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, *_):
            seen.update({name: keep._bits.data_ptr() for name, keep in enforcer.weights._keep.items()})

    enforcer.given = masks
    trainer = trainer_of("auto", tmp_path, [enforcer, Look()], devices=1, max_steps=1)
    trainer.fit(module, datamodule=batches())
    assert seen == {name: masks.packed(name).data_ptr() for name in masks}
