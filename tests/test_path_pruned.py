"""Models that are pruned from files before their module builds them: as if they had been there from the beginning."""

import json

import pytest
import torch
from fits import trainer_of
from hydra import initialize_config_dir
from hydra.utils import instantiate
from launch import ended, good, together
from peft import LoraConfig
from rank_fits import batches, data
from test_path import MODELS, SCRIPT, weight_bytes
from tiers import slow
from transformers import AutoModelForCausalLM

import train
from prune_callbacks import (
    NM,
    OWL,
    BlockReconstruction,
    CausalLM,
    IMPSchedule,
    IterativePrune,
    LoRARecovery,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    PermuteChannels,
    SparseGPT,
    Unstructured,
    Wanda,
)
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.storage.consolidation import consolidate
from prune_callbacks.tasks import tiny_checkpoint

KINDS = {"weight", "master", "exp_avg", "exp_avg_sq"}
SHARDED = ["fsdp2", slow("zero1"), slow("zero2"), "zero3"]


@pytest.fixture
def folder(tmp_path):
    MODELS["tied llama"]().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path


def loaded(folder, name, rank=0):
    return torch.load(folder / f"{name}_{rank}.pt")


def all_zero(worst, steps):
    return len(worst) == steps and all(row == dict.fromkeys(KINDS, 0.0) for row in worst)


def fit(module, folder, callbacks, **settings):
    trainer = trainer_of(callbacks, folder, **({"max_steps": 3} | settings))
    trainer.fit(module, datamodule=batches(4))
    return trainer


def in_memory(folder):
    return CausalLM(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32))


def same_masks(one, other):
    return one.keys() == other.keys() and all(torch.equal(keep, other[name]) for name, keep in one.items())


def close(one, other, tolerance):
    assert one.keys() == other.keys()
    return all((value - other[name]).abs().max() <= tolerance for name, value in one.items())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    MODELS["tied llama"]().save_pretrained(folder / "model", max_shard_size="60KB")
    together(SCRIPT, "pruned", folder, "ddp")
    return [loaded(folder, "ddp_init", rank) for rank in range(2)]


@pytest.mark.parametrize("name", SHARDED)
def test_pruned_from_files_trained_in_shards_and_resumed(folder, ddp, name):
    together(SCRIPT, "pruned", folder, name)
    for rank in range(2):
        by_path, usual = loaded(folder, f"{name}_path", rank), loaded(folder, f"{name}_init", rank)
        assert same_masks(by_path["masks"], ddp[rank]["masks"])
        assert same_masks(by_path["masks"], usual["masks"])
        assert by_path["layers"] == usual["layers"]
        assert by_path["skipped"] == usual["skipped"]
        assert all_zero(by_path["worst"], 12)
        assert by_path["losses"] == pytest.approx(ddp[rank]["losses"], abs=1e-5)
        assert close(by_path["weights"], ddp[rank]["weights"], 1e-4)
        assert by_path["files"] == str(folder / f"{name}_path/pruned")
        assert usual["files"] == "None"
    where = folder / f"{name}_path"
    saved = AutoModelForCausalLM.from_pretrained(where / "model").state_dict()
    whole = {key.removeprefix("model."): value for key, value in loaded(folder, f"{name}_path")["weights"].items()}
    assert all(torch.equal(value, saved[key]) for key, value in whole.items())
    index = json.loads((where / "model/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3  # two blocks, and the rest
    assert MaskSet.load(where / "masks.safetensors") == MaskSet(by_path["masks"])
    record = json.loads((where / "report.json").read_text())
    assert record["stage"] == "recovered"
    assert record["violations"] == {}
    usual = json.loads((folder / f"{name}_init/report.json").read_text())
    for stage in ("dense", "pruned", "recovered"):
        assert record["perplexity"][stage] == pytest.approx(usual["perplexity"][stage], rel=1e-5)
    assert record["perplexity"]["dense"] > 1
    assert not list(where.glob("hidden*"))
    written = (where / "pruned/report.json").stat().st_mtime_ns
    together(SCRIPT, "goes_on", folder, name)
    resumed = loaded(folder, f"{name}_resumed_2")
    assert all_zero(resumed["worst"], 7)
    assert resumed["losses"] == loaded(folder, f"{name}_path")["losses"][5:]
    assert (where / "pruned/report.json").stat().st_mtime_ns == written
    if name == "fsdp2":  # DeepSpeed's are converted first: test_train_ranks
        good(ended(SCRIPT, "goes_on", folder, name))
        alone = loaded(folder, f"{name}_resumed_1")
        assert all_zero(alone["worst"], 7)
        assert close(alone["weights"], loaded(folder, f"{name}_path")["weights"], 1e-4)
    consolidate(where / "step=5.ckpt", folder / "model", folder / "one")
    assert MaskSet.load(folder / "one/masks.safetensors") == MaskSet(by_path["masks"])


@pytest.mark.parametrize("name", SHARDED)
def test_rounds_of_a_model_from_a_path_are_those_of_one_built_in_init(folder, name):
    together(SCRIPT, "rounds", folder, name)
    usual, by_path = (loaded(folder, f"{name}_{way}") for way in ("init", "path"))
    assert same_masks(usual["masks"], by_path["masks"])
    assert by_path["losses"] == usual["losses"]
    assert all_zero(by_path["worst"], 12)
    assert MaskSet(by_path["masks"]).sparsity() == pytest.approx(0.75, abs=1e-3)


def test_on_one_device_the_report_is_that_of_pruning_in_memory(folder):
    found = {}
    for way in ("memory", "files"):
        module = in_memory(folder) if way == "memory" else CausalLM(path=folder / "model", dtype="float32")
        prune = OneShotPrune(SparseGPT(NM(2, 4)), data(12).split(4), progress=False, dirpath=folder / way)
        fit(module, folder, [prune, MaskEnforcer()])
        found[way] = prune.report
    memory, files = found["memory"], found["files"]
    assert files.masks == memory.masks
    assert [layer.name for layer in files.layers] == [layer.name for layer in memory.layers]
    for one, other in zip(files.layers, memory.layers, strict=True):
        assert (one.shape, one.sparsity) == (other.shape, other.sparsity)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    assert (files.skipped, files.tokens, files.input_first) == (memory.skipped, memory.tokens, memory.input_first)
    assert files.seconds > 0
    assert type(files).from_state_dict(files.state_dict()) == files


def test_pruned_files_that_are_there_are_used_and_those_of_another_setting_refused(folder):
    def prune(pruner=Magnitude(NM(2, 4))):  # noqa: B008
        return [OneShotPrune(pruner, progress=False), MaskEnforcer()]

    def times():
        return {path: path.stat().st_mtime_ns for path in (folder / "pruned").rglob("*")}

    fit(CausalLM(path=folder / "model"), folder, prune())
    before = times()
    assert (folder / "pruned/model/config.json") in before
    fit(CausalLM(path=folder / "model"), folder, prune())
    assert times() == before
    with pytest.raises(ValueError, match=r"pruned was started with another setting: pruner was Magnitude.*another fol"):
        fit(CausalLM(path=folder / "model"), folder, prune(Magnitude(NM(1, 4))))
    assert times() == before


def test_a_fit_that_fails_while_it_prunes_goes_on_at_the_block_it_was_at(folder, monkeypatch):
    from prune_callbacks.streaming.walk import BlockWalk

    whole = fit(
        CausalLM(path=folder / "model"),
        folder / "a",
        callbacks := [OneShotPrune(Wanda(NM(2, 4)), data(8).split(4)), MaskEnforcer()],
    )
    assert whole.global_step == 3
    pruning, seen = BlockWalk._prune, []

    def fails(self, journal, index, *arguments):
        seen.append(index)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return pruning(self, journal, index, *arguments)

    monkeypatch.setattr(BlockWalk, "_prune", fails)
    again = [OneShotPrune(Wanda(NM(2, 4)), data(8).split(4)), MaskEnforcer()]
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(CausalLM(path=folder / "model"), folder / "b", again)
    fit(CausalLM(path=folder / "model"), folder / "b", again)
    assert seen == [0, 1, 1]
    assert again[0].report.masks == callbacks[0].report.masks


def test_a_trial_run_leaves_neither_files_nor_a_pruned_model(folder):
    module = CausalLM(path=folder / "model", dtype="float32")
    prune = OneShotPrune(SparseGPT(NM(2, 4)), data(12).split(4), progress=False)
    trainer_of([prune, MaskEnforcer()], folder, fast_dev_run=True).fit(module, datamodule=batches(4))
    assert prune.report.masks.sparsity() == 0.5
    assert module.unbuilt() == folder / "model"
    assert not list(folder.glob("pruned*"))
    fit(module, folder, [prune, MaskEnforcer()])
    assert MaskSet.load(folder / "pruned/masks.safetensors") == prune.report.masks


REFUSED = {
    "allocation=OWL": {"allocation": OWL()},
    "forward=<function": {"forward": lambda model, batch: model(batch)},
    "written_windows=2": {"written_windows": 2},
    "order='at_once'": {"order": "at_once"},
    "blocks=": {"blocks": ["model.layers", "model.others"]},
}


@pytest.mark.parametrize("text", REFUSED)
def test_settings_that_need_the_whole_model_are_refused(folder, text):
    pruner = Wanda(Unstructured(0.5)) if text.startswith("alloc") else Wanda(NM(2, 4))
    prune = OneShotPrune(pruner, data(8).split(4), **REFUSED[text])
    with pytest.raises(ValueError, match=f"{text}.*needs the whole model, and CausalLM builds it later"):
        fit(CausalLM(path=folder / "model"), folder, [prune, MaskEnforcer()])
    assert not (folder / "pruned").exists()


def test_callbacks_that_change_whole_weights_say_that_the_model_is_not_there_yet(folder):
    batch = data(8).split(4)
    callbacks = [PermuteChannels(NM(2, 4), batch), OneShotPrune(Wanda(NM(2, 4)), batch), MaskEnforcer()]
    with pytest.raises(ValueError, match="PermuteChannels needs the model when the fit begins: build the model in"):
        fit(CausalLM(path=folder / "model"), folder, callbacks)
    callbacks = [OneShotPrune(Magnitude(NM(2, 4))), MaskEnforcer(), LoRARecovery(LoraConfig(r=2))]
    with pytest.raises(ValueError, match="got CausalLM, whose model is built later: build it in __init__"):
        fit(module := CausalLM(path=folder / "model"), folder, callbacks)
    assert module.unbuilt() == folder / "model"  # and not the pruned files, which would be pruned again as if dense


def test_reconstruction_and_rounds_after_a_pruning_from_files(folder):
    reconstruction = BlockReconstruction(passes=1, batch_size=2)
    prune = OneShotPrune(Wanda(NM(2, 4)), data(12).split(4), reconstruction=reconstruction, progress=False)
    rounds = IterativePrune(IMPSchedule(0.75, rounds=2, every=1))
    fit(CausalLM(path=folder / "model", dtype="float32"), folder, [prune, rounds, MaskEnforcer()])
    assert [block.name for block in prune.report.reconstruction] == ["model.layers.0", "model.layers.1"]
    removed = {name: ~keep for name, keep in prune.report.masks.items()}
    assert all(not (rounds.masks[name] & gone).any() for name, gone in removed.items())
    assert rounds.masks.sparsity() == pytest.approx(0.75, abs=1e-3)


RECIPE = ["recipe=recover_deepspeed", "smoke=true", "module=causal_lm_from_path", "model=pretrained"]
ON_CPUS = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32-true"]
ZERO = "trainer.strategy._target_=cpu_strategies.CPUDeepSpeedStrategy"


@pytest.mark.parametrize("trainer", [slow("fsdp2"), "deepspeed_zero3"])
def test_the_recipe_loads_no_whole_model_on_any_rank(tmp_path, trainer):
    source = tiny_checkpoint(tmp_path / "dense")
    words = [*RECIPE, f"model.path={source}", f"trainer={trainer}", *ON_CPUS, *([ZERO] if "zero" in trainer else [])]
    together(SCRIPT, "recipe", tmp_path, *words)
    total = weight_bytes(tmp_path, "dense")
    read = [loaded(tmp_path, "recipe", rank)["read"] for rank in range(2)]
    assert total <= sum(read)
    assert max(read) <= 0.6 * total
    record = json.loads((tmp_path / "run/report.json").read_text())
    assert record["perplexity"]["dense"] > 1
    assert record["perplexity"]["recovered"] < record["perplexity"]["pruned"]
    assert (record["violations"], record["processes"], record["sparsity"]["achieved"]) == ({}, 2, 0.5)
    whole = perplexity(AutoModelForCausalLM.from_pretrained(source), _evaluated(), progress=False)
    assert record["perplexity"]["dense"] == pytest.approx(whole, rel=1e-5)


def _evaluated():
    """The evaluation windows of the smoke run."""
    with initialize_config_dir(str(train.RECIPES.folder), version_base="1.3"):
        cfg = train.composed(["recipe=magnitude_50", "smoke=true"])
    data = instantiate(cfg.data)
    data.setup("fit")
    return data.evaluation_windows
