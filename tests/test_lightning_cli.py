"""The callbacks in the YAML and on the shell of Lightning's own command line, LightningCLI."""

import argparse
import csv
import inspect
import json
import runpy
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytest
import torch
import yaml
from torch import Tensor

import prune_callbacks
from prune_callbacks import NM, OWL, CubicSchedule, MaskEnforcer, OneShotPrune, Rewind, SparseGPT, Unstructured, Wanda
from prune_callbacks.extend import Allocation, Pattern, Pruned, Pruner, Schedule, Statistic
from prune_callbacks.interfaces import compared_by_name
from prune_callbacks.solvers import Gram, InputNorm

pytest.importorskip("jsonargparse", reason="the extra cli is not installed")

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "lightning_cli"


def part(name, **settings):
    """A class with its arguments, as YAML names it."""
    return {"class_path": name if "." in name else f"prune_callbacks.{name}", "init_args": settings}


HALF = part("Unstructured", sparsity=0.5)
BYTES = "prune_callbacks.tasks.byte_tokenizer"


def one_shot(pruner, **settings):
    return part("OneShotPrune", pruner=pruner, **settings)


def rounds(schedule, **settings):
    return part("IterativePrune", schedule=schedule, **settings)


CASES = {
    **{name: one_shot(part(name, pattern=HALF)) for name in ("Magnitude", "Wanda", "RIA", "SparseGPT", "ALPS")},
    "MRP": one_shot(part("MRP", pattern=part("NM", n=2, m=4), variant="MM", block_size=None)),
    "SparseGPTQ": one_shot(part("SparseGPTQ", pattern=HALF, grid={"bits": 3, "group_size": None})),
    "GPTQ": one_shot(part("GPTQ", pruner=part("Wanda", pattern=HALF), grid=part("Grid", bits=3))),
    "GPTQ alone": one_shot("prune_callbacks.GPTQ"),
    "Structured": one_shot(part("Structured", pattern={"sparsity": 0.25}, score="wanda")),
    "NM": one_shot(part("Wanda", pattern=part("NM", n=2, m=4))),
    "Block": one_shot(part("Wanda", pattern=part("Block", size=4, sparsity=0.5))),
    "Rows": one_shot(part("Wanda", pattern=part("Rows", sparsity=0.5))),
    "Columns": one_shot(part("Wanda", pattern=part("Columns", sparsity=0.5))),
    "Unstructured": one_shot(
        part("Wanda", pattern=part("Unstructured", sparsity=0.5, per="even")), targets=["*.mlp.*"]
    ),
    "OWL": one_shot(part("Wanda", pattern=HALF), allocation=part("OWL", reach=0.05)),
    "LagrangianAllocation": one_shot(
        part("Wanda", pattern=HALF), allocation=part("LagrangianAllocation", importance={"model.layers.0": 2.0})
    ),
    "SensitivityAllocation": one_shot(
        part("Wanda", pattern=HALF), allocation=part("SensitivityAllocation", sensitivity={"model.layers.0": 2.0})
    ),
    "ConstantSchedule": rounds(part("ConstantSchedule", target=0.9, unit="epoch"), scope="layer"),
    "LinearSchedule": rounds(
        part("LinearSchedule", target=0.5, begin=0, end=4),
        pruner=part("Magnitude", pattern=HALF),
        blocks="model.layers",
    ),
    "CubicSchedule": rounds(part("CubicSchedule", target=0.8, begin=0, end=40, every=10)),
    "IMPSchedule": rounds(part("IMPSchedule", target=0.9, rounds=3, every=5), rewind={"step": 2, "dirpath": "x"}),
    "Rewind": rounds(
        part("IMPSchedule", target=0.9, rounds=3, every=5), rewind=part("Rewind", step=1, optimizer=False)
    ),
    "MaskEnforcer": part("MaskEnforcer", masks="a/masks.safetensors"),
    "SparsityMonitor": part("SparsityMonitor", dirpath="x", every_n_steps=3),
    "RunReport": part("RunReport", dirpath="x", tokenizer=BYTES, zero_shot=part("ZeroShot", tasks=["piqa"])),
    "LoRARecovery": part("LoRARecovery", config={"r": 4, "lora_alpha": 8}, masked=False, dirpath="x"),
    "PermuteChannels": part("PermuteChannels", pattern={"n": 2, "m": 4}),
    "QuantizeWeights": part("QuantizeWeights", dirpath="x", grid={"bits": 8}),
    "SemiStructuredConvert": part("SemiStructuredConvert", precision="int8"),
    "ShrinkModel": part("ShrinkModel", dirpath="x", tokenizer=BYTES),
    "SparsityBenchmark": part("SparsityBenchmark", batches=[1, 2], compiled=False),
}
"""Of every public pruner, pattern, allocation, schedule and callback one that YAML names."""


@dataclass(frozen=True)
class Own:
    """A user's pruner: it inherits from nothing, and its annotations are not those of the Protocol."""

    pattern: Pattern
    power: float = 1.0

    def statistic(self, in_features: int, device=None) -> None:
        return None

    def prune(self, weight: Tensor, statistic: Statistic | None) -> Pruned:
        keep = self.pattern.keep(weight.abs() ** self.power)
        return Pruned(weight * keep, keep, None)


class Bare:
    """A user's pruner without annotations of its methods."""

    def __init__(self, pattern: Pattern):
        self.pattern = pattern

    def statistic(self, in_features, device=None):
        return None

    def prune(self, weight, statistic):
        return Own(self.pattern).prune(weight, statistic)


@dataclass(frozen=True)
class Everything:
    """A user's pattern that keeps everything."""

    sparsity: float = 0.0

    def keep(self, scores, start=0):
        return torch.ones_like(scores, dtype=torch.bool)

    def check_shape(self, shape):
        pass

    def holds(self, keep):
        return True


@pytest.fixture(scope="module")
def parser():
    """The parser of LightningCLI, which raises errors in place of exiting."""
    kwargs = {"parser_kwargs": {"exit_on_error": False}, "save_config_callback": None, "seed_everything_default": False}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", ["main.py"])
        return LightningCLI(BoringModel, args=[], run=False, **kwargs).parser


def made(parser, config):
    return parser.instantiate_classes(config).trainer.callbacks


def of_yaml(parser, *callbacks):
    return parser.parse_string(yaml.safe_dump({"trainer": {"callbacks": list(callbacks)}}))


def printed(parser, config):
    """What --print_config writes."""
    return parser.dump(config, skip_none=False)


def settings(callback):
    """What a callback was made with, to be compared: values, and of other objects their class."""
    names = [name for name in inspect.signature(type(callback)).parameters if name in vars(callback)]
    values = {name: vars(callback)[name] for name in names}
    plain = (str, int, float, list, type(None), Path)
    return {n: v if isinstance(v, plain) or is_dataclass(v) else type(v) for n, v in values.items()}


@pytest.mark.parametrize("case", CASES)
def test_yaml_makes_it_and_what_is_printed_makes_it_again(parser, case):
    config = of_yaml(parser, CASES[case])
    text = printed(parser, config)
    again = parser.parse_string(text)
    assert printed(parser, again) == text
    (first,), (second,) = made(parser, config), made(parser, again)
    assert type(first) is type(second) is getattr(prune_callbacks, CASES[case]["class_path"].rpartition(".")[2])
    assert settings(first) == settings(second) != {}


def test_every_public_part_is_among_the_cases():
    """A new pruner, pattern, allocation, schedule or callback needs a case above."""
    rooms = ("pruners", "sparsity", "allocation", "callbacks")
    public = {
        name
        for name in prune_callbacks.__all__
        if getattr(prune_callbacks, name).__module__.split(".")[1] in rooms and name not in ("MaskSet", "Pruned")
    }
    assert len(public) > 25
    assert {name for name in public if f"prune_callbacks.{name}" not in repr(CASES)} == set()


def test_values_arrive(parser):
    config = of_yaml(parser, CASES["OWL"], CASES["CubicSchedule"], CASES["Rewind"])
    one, cubic, imp = made(parser, config)
    assert (one.pruner, one.allocation) == (Wanda(Unstructured(0.5)), OWL(reach=0.05))
    assert cubic.schedule == CubicSchedule(0.8, begin=0, end=40, every=10)
    assert imp.rewind == Rewind(1, optimizer=False)


@pytest.mark.parametrize(
    ("pruner", "expected"),
    [
        (part(f"{__name__}.Own", pattern=HALF, power=2.0), Own(Unstructured(0.5), 2.0)),
        (part("Magnitude", pattern=f"{__name__}.Everything"), prune_callbacks.Magnitude(Everything())),
    ],
)
def test_classes_of_a_users_own(parser, pruner, expected):
    config = of_yaml(parser, one_shot(pruner))
    assert made(parser, config)[0].pruner == expected
    assert made(parser, parser.parse_string(printed(parser, config)))[0].pruner == expected


def test_an_own_class_without_annotations(parser):
    (callback,) = made(parser, of_yaml(parser, one_shot(part(f"{__name__}.Bare", pattern=HALF))))
    assert type(callback.pruner).__name__ == "Bare"
    assert callback.pruner.pattern == Unstructured(0.5)


def test_an_allocation_from_a_file(parser, tmp_path):
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({"setting": {"unit": "layer"}, "cells": {"a.b": {"increase": 2.0, "proxy": 1.0}}}))
    for name in ("SensitivityAllocation", "LagrangianAllocation"):
        allocation = part(f"prune_callbacks.{name}.from_file", path=str(path))
        (callback,) = made(parser, of_yaml(parser, one_shot(part("Wanda", pattern=HALF), allocation=allocation)))
        assert callback.allocation == getattr(prune_callbacks, name).from_file(path)


NESTED = "--trainer.callbacks.init_args.pruner.init_args.pattern.init_args.sparsity"


@pytest.mark.parametrize(
    ("shell", "pruner"),
    [
        (["--trainer.callbacks.pruner.pattern.sparsity=0.7"], SparseGPT(Unstructured(0.7))),
        ([NESTED, "0.7"], SparseGPT(Unstructured(0.7))),
        (
            [
                "--trainer.callbacks.pruner=prune_callbacks.Wanda",
                "--trainer.callbacks.pruner.pattern=prune_callbacks.NM",
                "--trainer.callbacks.pruner.pattern.n=2",
                "--trainer.callbacks.pruner.pattern.m=4",
            ],
            Wanda(NM(2, 4)),
        ),
    ],
)
def test_the_shell_changes_the_last_callback(parser, tmp_path, shell, pruner):
    path = tmp_path / "config.yaml"
    callbacks = ["prune_callbacks.MaskEnforcer", CASES["SparseGPT"]]
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    enforcer, one = made(parser, parser.parse_args(["--config", str(path), *shell]))
    assert isinstance(enforcer, MaskEnforcer)
    assert one.pruner == pruner


def test_the_shell_alone_names_all_callbacks(parser):
    arguments = {
        "+": "prune_callbacks.IterativePrune",
        ".schedule": "prune_callbacks.CubicSchedule",
        ".schedule.target": "0.8",
        ".schedule.begin": "0",
        ".schedule.end": "10",
        ".rewind.step": "2",
    }
    shell = [f"--trainer.callbacks{key}={value}" for key, value in arguments.items()]
    callbacks = made(parser, parser.parse_args([*shell, "--trainer.callbacks+=prune_callbacks.MaskEnforcer"]))
    assert [type(callback).__name__ for callback in callbacks] == ["IterativePrune", "MaskEnforcer"]
    assert callbacks[0].schedule == CubicSchedule(0.8, 0, 10)
    assert callbacks[0].rewind == Rewind(2)


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (one_shot(part("Wnada", pattern=HALF)), "prune_callbacks has no Wnada; did you mean Wanda?"),
        (
            one_shot(part("Unstructured", sparsity=0.5)),
            "prune_callbacks.Unstructured does not implement protocol Pruner",
        ),
        (one_shot(part("Wanda", pattern=part("Wanda"))), "prune_callbacks.Wanda does not implement protocol Pattern"),
        (one_shot(part("Wanda", pattern=part("Unstructured", sparsty=0.5))), "'sparsty' is not accepted"),
        (
            one_shot(part("Wanda", pattern=HALF), allocation="prune_callbacks.NM"),
            "does not implement protocol Allocation",
        ),
        (rounds(part("CubicSchedule", target="much", begin=0, end=1)), "Expected a <class 'float'>. Got value: much"),
    ],
)
def test_what_cannot_be_parsed_is_named(parser, callback, text):
    with pytest.raises(argparse.ArgumentError) as error:
        of_yaml(parser, callback)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (one_shot(part("Wanda", pattern=part("Unstructured", sparsity=1.5))), r"Unstructured: sparsity .* got 1\.5"),
        (one_shot(part("Wanda", pattern=HALF), num_batches=0), "num_batches must be at least 1, got 0"),
        (rounds(part("CubicSchedule", target=80, begin=0, end=1)), r"CubicSchedule: target .* got 80"),
        (rounds(part("ConstantSchedule", target=0.5), rewind={"step": -1}), "Rewind: step .* got -1"),
    ],
)
def test_a_value_that_is_refused_says_so(parser, callback, text):
    config = of_yaml(parser, callback)
    with pytest.raises(ValueError, match=text):
        parser.instantiate_classes(config)


@pytest.mark.parametrize("protocol", [Pruner, Pattern, Allocation, Schedule])
def test_the_methods_of_a_protocol_take_anything_at_run_time(protocol):
    methods = [
        f for name, f in inspect.getmembers(protocol, inspect.isfunction) if name[0] != "_" or name == "__call__"
    ]
    assert methods
    for method in methods:
        found = inspect.signature(method)
        types = {found.return_annotation, *(p.annotation for p in found.parameters.values())}
        assert types <= {Any, inspect.Parameter.empty}


def test_control_with_types_of_its_own_a_protocol_refuses_what_satisfies_it():
    @runtime_checkable
    class Typed(Protocol):
        def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram | InputNorm | None: ...

        def prune(self, weight: Tensor, statistic: Statistic | None) -> Pruned: ...

    def accepts(protocol):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--pruner", type=protocol)
        return parser.instantiate_classes(parser.parse_object({"pruner": part("Wanda", pattern=HALF)})).pruner

    with pytest.raises(argparse.ArgumentError, match="Wanda does not implement protocol Typed"):
        accepts(Typed)
    assert accepts(compared_by_name(Typed)) == Wanda(Unstructured(0.5))


SMALL = (
    "--trainer.max_epochs=1",
    "--data.seq_len=32",
    "--data.batch_size=4",
    "--data.train_windows=16",
    "--data.calibration_windows=4",
    "--data.evaluation_windows=4",
    "--model.model.hidden_size=32",
)


def example(monkeypatch, tmp_path, *arguments):
    """Runs the example as the shell does, in this process; returns its folder with metrics.csv and config.yaml."""
    folder = tmp_path / "runs"
    argv = ["main.py", "fit", *arguments, f"--trainer.logger.save_dir={folder}"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    runpy.run_path(str(EXAMPLE / "main.py"), run_name="__main__")
    monkeypatch.delitem(sys.modules, "main", raising=False)
    return max((folder / "lightning_cli").iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))


@pytest.fixture
def text(tmp_path):
    """Arguments that name a small text in place of the language reference."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{n} times {n} is {n * n}." for n in range(2000)))
    return [f"--data.{corpus}={path}" for corpus in ("train", "calibration", "evaluation")]


def test_a_text_is_a_path_for_the_shell_and_not_a_file_of_settings(tmp_path, tokenizer):
    """jsonargparse reads a file that is named for a class, but not where the annotation has a Path beside it."""
    path = tmp_path / "text.txt"
    path.write_text("a: b\n" * 100)
    data = prune_callbacks.TokenDataModule(tokenizer, path, str(path), path)
    assert set(map(type, data.corpora.values())) == {prune_callbacks.tasks.TextFile}
    assert data.corpora["train"].path == str(path)


def last(folder, name):
    with (folder / "metrics.csv").open() as file:
        return float([row[name] for row in csv.DictReader(file) if row.get(name)][-1])


def test_the_example_prunes_holds_and_runs_again_from_what_it_saved(monkeypatch, tmp_path):
    config = str(EXAMPLE / "config.yaml")
    first = example(
        monkeypatch, tmp_path, "--config", config, *SMALL, "--trainer.callbacks.pruner.pattern.sparsity=0.7"
    )
    assert last(first, "sparsity") == pytest.approx(0.7, abs=1e-3)
    assert last(first, "violations") == 0
    again = example(monkeypatch, tmp_path, "--config", str(first / "config.yaml"))
    assert again != first
    assert (again / "metrics.csv").read_text() == (first / "metrics.csv").read_text()


def test_the_example_prunes_in_rounds(monkeypatch, tmp_path, text):
    configs = [f"--config={EXAMPLE / name}" for name in ("config.yaml", "rounds.yaml")]
    folder = example(monkeypatch, tmp_path, *configs, *SMALL, *text, "--data.train_windows=288")
    assert last(folder, "sparsity") == pytest.approx(0.5, abs=1e-3)
    assert last(folder, "violations") == 0


def test_the_example_with_a_model_of_a_folder(monkeypatch, tmp_path, text, tokenizer):
    folder = tmp_path / "model"
    prune_callbacks.tasks.tiny_llama(hidden_size=32, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = ("--model.model=main.pretrained_model", f"--model.model.path={folder}")
    words = ("--data.tokenizer=main.pretrained_tokenizer", f"--data.tokenizer.path={folder}")
    run = example(monkeypatch, tmp_path, f"--config={EXAMPLE / 'config.yaml'}", *SMALL[:-1], *text, *model, *words)
    assert last(run, "sparsity") == pytest.approx(0.5, abs=1e-3)


def test_a_module_without_an_optimizer_in_yaml_is_printed_and_made_again(capsys, monkeypatch, tmp_path):
    """Its default is a function, which has an import path; a partial could not be printed."""
    monkeypatch.setattr(sys, "argv", ["main.py"])
    config = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    del config["model"]["init_args"]["optimizer"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))

    def cli(*arguments):
        kwargs = {"run": False, "save_config_callback": None, "auto_configure_optimizers": False}
        return LightningCLI(args=["--config", str(path), *arguments], **kwargs)

    with pytest.raises(SystemExit):
        cli("--print_config")
    text = capsys.readouterr().out
    assert "Unable to serialize" not in text
    expected = cli().config
    path.write_text(text)
    again = cli()
    assert again.config.model == expected.model
    assert again.config.trainer == expected.trainer
    assert isinstance(again.trainer.callbacks[-1], OneShotPrune)
    group = again.model.configure_optimizers().param_groups[0]
    assert group["lr"] == 1e-4
