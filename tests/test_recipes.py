"""Every recipe is composed and instantiated; every file says how it is run."""

import importlib.util
import re
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer

import prune_callbacks
from prune_callbacks import (
    ALPS,
    MRP,
    NM,
    OWL,
    BlockReconstruction,
    CausalLM,
    Columns,
    ConstantSchedule,
    CubicSchedule,
    IMPSchedule,
    IterativePrune,
    LagrangianAllocation,
    LanguageModeling,
    LogitsDistillation,
    Magnitude,
    MaskEnforcer,
    MeasuredAllocation,
    OneShotPrune,
    RunReport,
    SparseGPT,
    SquareHead,
    Structured,
    Unstructured,
    Wanda,
)
from prune_callbacks.parallel.strategies import check_strategy
from prune_callbacks.pruners.ria import RIA
from prune_callbacks.tasks import DigitsDataModule, HubText, ImageClassifier, tiny_llama

ROOT = Path(__file__).parent.parent
train = importlib.util.spec_from_file_location("train", ROOT / "train.py")
train.loader.exec_module(importlib.util.module_from_spec(train))  # the resolvers that recipes use
FILES = sorted(path.stem for path in (ROOT / "recipes/recipe").glob("*.yaml"))
JOBS = {"consolidate", "prune_streaming", "sensitivity", "sweep"}  # which train nothing
JOBS |= {name for name in FILES if name.startswith("ablate_")}
NAMES = [name for name in FILES if name not in JOBS]
PRUNERS = {
    "magnitude_50": Magnitude(Unstructured(0.5)),
    "wanda_50": Wanda(Unstructured(0.5)),
    "wanda_2of4": Wanda(NM(2, 4)),
    "sparsegpt_50": SparseGPT(Unstructured(0.5)),
    "sparsegpt_2of4": SparseGPT(NM(2, 4)),
    "mrp_50": MRP(Unstructured(0.5)),
    "mrp_2of4": MRP(NM(2, 4)),
    "alps_50": ALPS(Unstructured(0.5)),
    "alps_2of4": ALPS(NM(2, 4)),
    "recover_deepspeed": SparseGPT(NM(2, 4)),
    "recover_distill": SparseGPT(NM(2, 4)),
    "recover_masked_lora": SparseGPT(NM(2, 4)),
    "deploy_2of4": SparseGPT(NM(2, 4)),
    "deploy_2of4_int8": SparseGPT(NM(2, 4)),
    "sparse_int4": SparseGPT(NM(2, 4)),
    "shrink_25": Structured(Columns(0.25)),
    "permute_2of4": Wanda(NM(2, 4)),
    "best_2of4": ALPS(NM(2, 4)),
    "best_50": ALPS(Unstructured(0.5)),
}
SCHEDULES = {
    "imp_90": IMPSchedule(0.9, rounds=10, every=270, begin=300),
    "oneshot_90": IMPSchedule(0.9, rounds=1, every=270, begin=1500),
    "gradual_cubic_80": CubicSchedule(0.8, begin=0, end=80, every=10),
    "digits_imp_90": IMPSchedule(0.9, rounds=10, every=135, begin=150),
    "digits_oneshot_90": IMPSchedule(0.9, rounds=1, every=135, begin=750),
}
OBJECTIVES = {"recover_distill": SquareHead, "best_2of4": LogitsDistillation, "best_50": LogitsDistillation}
IMAGES = {"digits_imp_90", "digits_oneshot_90"}


def compose(*overrides):
    with hydra.initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def small(name, tmp_path):
    """The recipe itself, but for the model: that needs the 500 MB one, which has a test of its own."""
    model = [] if name in IMAGES else ["model=tiny_llama"]
    # DeepSpeed needs CUDA devices, and a model that is built later needs files.
    trainer = ["trainer=cpu_or_gpu", "module=causal_lm"] if name == "recover_deepspeed" else []
    return compose(f"recipe={name}", *model, f"output_dir={tmp_path}", *trainer)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_instantiated(name, tmp_path):
    cfg = small(name, tmp_path)
    assert cfg.name == name
    callbacks = instantiate(cfg.callbacks)
    prunes = "iterative" if name in SCHEDULES else "one_shot"
    before = ["permute"] if name in ("permute_2of4", "best_2of4") else []
    assert list(callbacks)[: 3 + len(before)] == ["report", *before, prunes, "enforcer"]
    assert isinstance(callbacks.report, RunReport)
    assert isinstance(callbacks[prunes], IterativePrune if name in SCHEDULES else OneShotPrune)
    assert isinstance(callbacks.enforcer, MaskEnforcer)
    module = instantiate(cfg.module)
    assert isinstance(module, ImageClassifier if name in IMAGES else CausalLM)
    if name not in IMAGES:
        assert type(module.objective) is OBJECTIVES.get(name, LanguageModeling)
    trainer = instantiate(
        cfg.trainer, callbacks=list(callbacks.values()), logger=list(instantiate(cfg.logger).values())
    )
    assert isinstance(trainer, Trainer)
    if name in PRUNERS:
        best = name.startswith("best")
        assert callbacks.one_shot.reconstruction == (BlockReconstruction(passes=3) if best else None)
        assert callbacks.one_shot.written_windows == (96 if best else 0)
        assert callbacks.one_shot.allocation == (MeasuredAllocation() if name == "best_50" else None)
        assert callbacks.one_shot.pruner == PRUNERS[name]
    if name in SCHEDULES:
        assert callbacks.iterative.schedule == SCHEDULES[name]
        assert callbacks.iterative.schedule.changes[-1] < trainer.max_steps
    data = instantiate(cfg.data)
    if name in IMAGES:
        assert isinstance(data, DigitsDataModule)
        return
    data.setup("fit")
    assert data.calibration_windows.shape[1] == data.evaluation_windows.shape[1] == cfg.data.seq_len


def test_the_recipes_of_the_readme_exist():
    assert set(PRUNERS) | set(SCHEDULES) | {"demo", "recover_lora"} | JOBS == set(FILES)
    readme = (ROOT / "README.md").read_text()
    assert [name for name in FILES if f"`{name}`" not in readme and f"recipe={name}" not in readme] == []


@pytest.mark.parametrize(
    ("allocation", "wanted"),
    [(None, None), ("owl", OWL(5.0, 0.08)), ("lagrangian", LagrangianAllocation(0.15, 3))],
)
def test_allocations_are_instantiated(allocation, wanted, tmp_path):
    given = [f"allocation={allocation}"] if allocation else []
    cfg = compose("recipe=wanda_50", "model=tiny_llama", f"output_dir={tmp_path}", *given)
    assert instantiate(cfg.callbacks.one_shot).allocation == wanted


def test_ria_is_a_value_of_the_pruner(tmp_path):
    cfg = compose("recipe=wanda_50", "model=tiny_llama", f"output_dir={tmp_path}", "pruner=ria", "pruner.power=1.0")
    assert instantiate(cfg.callbacks.one_shot).pruner == RIA(Unstructured(0.5), 1.0)


@pytest.mark.parametrize("images", ["", "digits_"])
def test_imp_and_what_it_is_measured_against_share_all_but_the_method(images, tmp_path):
    imp, one_shot = small(f"{images}imp_90", tmp_path), small(f"{images}oneshot_90", tmp_path)
    assert imp.beside == [one_shot.name]
    for key in ("model", "data", "optimizer", "trainer", "pattern", "seed"):
        assert imp[key] == one_shot[key]
    assert imp.trainer.max_steps == imp.schedule.begin + imp.schedule.rounds * imp.schedule.every
    rewind = instantiate(imp.callbacks).iterative.rewind
    assert rewind.step == imp.schedule.begin - imp.schedule.every == imp.module.scheduler_steps - imp.schedule.every
    assert instantiate(one_shot.callbacks).iterative.rewind is None


def test_lora_recipes(tmp_path):
    for name, masked in (
        ("recover_lora", False),
        *((n, True) for n in ("recover_masked_lora", "best_2of4", "best_50")),
    ):
        lora = instantiate(small(name, tmp_path).callbacks).lora
        assert lora.masked is masked
        assert (lora.config.r, lora.config.lora_alpha) == (16, 32)


@pytest.mark.parametrize("objective", ["language_modeling", "logits", "squarehead"])
def test_every_objective_is_instantiated_with_the_dense_model(tmp_path, objective):
    module = instantiate(compose("recipe=wanda_50", "model=tiny_llama", f"objective={objective}").module)
    if objective != "language_modeling":
        student, teacher = module.model, module.objective.teacher.model
        assert student is not teacher
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_ramps_are_instantiated(schedule):
    cfg = compose("recipe=gradual_cubic_80", "model=tiny_llama", f"schedule={schedule}")
    assert instantiate(cfg.schedule).changes == range(10, 81, 10)


def test_a_constant_schedule_is_instantiated():
    cfg = compose("recipe=wanda_50", "model=tiny_llama", "schedule=constant", "schedule.begin=7")
    assert instantiate(cfg.schedule) == ConstantSchedule(0.5, begin=7)


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"]
)
def test_every_trainer_is_instantiated(name, tmp_path):
    """Without devices DeepSpeed's is not; its strategy is, by the class for CPUs."""
    cpu = ["trainer.strategy._target_=cpu_strategies.CPUDeepSpeedStrategy"] if "deepspeed" in name else []
    recipe = ["recipe=recover_deepspeed", "model=tiny_llama", f"output_dir={tmp_path}", f"trainer={name}"]
    cfg = compose(*recipe, "trainer.accelerator=cpu", "trainer.devices=2", *cpu)
    trainer = instantiate(cfg.trainer)
    check_strategy(trainer.strategy, "MaskEnforcer", whole_weights=False)
    assert trainer.num_devices == 2
    if cpu:
        real = compose(*recipe)
        assert real.trainer.strategy._target_ == "lightning.pytorch.strategies.DeepSpeedStrategy"
        zero = trainer.strategy.config["zero_optimization"]
        assert zero["stage"] == int(re.search(r"zero(\d)", name)[1])
        assert ("offload_optimizer" in zero) == ("offload_param" in zero) == ("offload" in name)
        assert real.trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_file_begins_with_its_command(name):
    lines = (ROOT / "recipes/recipe" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"  # Hydra reads it only in the first line
    assert re.fullmatch(rf"# python train\.py (--multirun )?recipe={name}( .*)?", lines[1])


@pytest.mark.parametrize("name", ["smollm2_135m", "opt_125m", "llama2_7b", "pretrained"])
def test_pretrained_models_load_from_their_path(name, tmp_path, tokenizer):
    folder = tmp_path / "model"
    tiny_llama(hidden_size=32, layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cfg = compose("recipe=wanda_50", f"model={name}", f"model.path={folder}", f"output_dir={tmp_path}")
    model = instantiate(cfg.module).model
    assert model.dtype == (torch.bfloat16 if name == "llama2_7b" else torch.float32)
    assert instantiate(cfg.callbacks).report.tokenizer("a").input_ids == tokenizer("a").input_ids


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_hub_data_follows_the_papers_protocol(name, tmp_path):
    data = instantiate(compose("recipe=wanda_50", "model=tiny_llama", f"data={name}", f"output_dir={tmp_path}").data)
    evaluation = data.corpora["evaluation"]
    assert evaluation == HubText("Salesforce/wikitext", "wikitext-2-raw-v1", split="test", join="\n\n")
    assert data.seq_len == 2048
    assert data._limits["calibration"] == 128


def test_text_file_data(tmp_path):
    (tmp_path / "a.txt").write_text("some words of text in a line\n" * 2000)
    overrides = ["data=text_file", f"data.path={tmp_path / 'a.txt'}", "data.seq_len=64", "data.train_windows=8"]
    data = instantiate(compose("recipe=wanda_50", "model=tiny_llama", *overrides, f"output_dir={tmp_path}").data)
    data.setup("fit")
    assert data.train_windows.shape == (8, 64)


def test_public_names_are_documented():
    for name in prune_callbacks.__all__:
        assert getattr(prune_callbacks, name).__doc__, name
