"""Sweeps: every point as in a fresh model, kept whatever happens, measured once; the recipes in real processes."""

import copy
import json
import os
import re
import signal
import sys
import time

import matplotlib.image
import pytest
import torch
from launch import TRAIN, started, train, trained

from prune_callbacks import (
    MRP,
    NM,
    OWL,
    Magnitude,
    SensitivityAllocation,
    SparseGPT,
    TokenDataModule,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.memory import peak_memory, reset_peak_memory
from prune_callbacks.reporting.comparison import main as comparison
from prune_callbacks.reporting.curves import curves, draw_curves, sweep_table
from prune_callbacks.studies import sweep_point
from prune_callbacks.tasks import PythonDocs, TextFile, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture
def data(tokenizer):
    made = make_data(tokenizer)
    made.setup("fit")
    return made


def make_data(tokenizer, **sizes):
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    given = {"train_windows": 2, "calibration_windows": 6, "evaluation_windows": 3} | sizes
    return TokenDataModule(tokenizer, *corpora, seq_len=48, **given)


def network():
    return tiny_llama(hidden_size=32, layers=2)


class Counted:
    calls = 0

    def __call__(self):
        self.calls += 1
        return network()


def test_every_point_is_that_of_a_fresh_model(tmp_path, data):
    make = Counted()
    pruners = [Wanda(Unstructured(0.3)), Wanda(Unstructured(0.6)), MRP(NM(1, 4)), SparseGPT(Unstructured(0.6))]
    points = [sweep_point(make, data, pruner, tmp_path, progress=False) for pruner in pruners]
    points.append(sweep_point(make, data, pruners[1], tmp_path, allocation=OWL(), progress=False))
    assert make.calls == 1  # one dense model
    for point, pruner, allocation in zip(points, [*pruners, pruners[1]], [None] * 4 + [OWL()], strict=True):
        fresh = network()
        report = prune_sequentially(
            fresh, data.calibration_windows.split(4), pruner, allocation=allocation, progress=False
        )
        assert point["perplexity"] == pytest.approx(perplexity(fresh, data.evaluation_windows, progress=False))
        assert point["sparsity"] == report.sparsity
        assert point["at"] == pruner.pattern.sparsity
        assert point["seconds"] > 0
        assert point["peak_memory_bytes"] > 1e8
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["dense"] == pytest.approx(perplexity(network(), data.evaluation_windows, progress=False))
    assert list(written["cells"].values()) == points
    assert {name: [point["at"] for point in found] for name, found in curves(written).items()} == {
        "Wanda, unstructured": [0.3, 0.6],
        "MRP, N:M": [0.75],
        "SparseGPT, unstructured": [0.6],
        "Wanda, unstructured, OWL": [0.6],
    }


def test_what_is_measured_is_not_measured_again(tmp_path, tokenizer, data, monkeypatch, capsys):
    first = sweep_point(network, data, Wanda(Unstructured(0.5)), tmp_path, progress=False)
    before = (tmp_path / "sweep.json").read_bytes()

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr("prune_callbacks.studies.sweep.prune_sequentially", refuse)
        assert sweep_point(refuse, make_data(tokenizer), Wanda(Unstructured(0.5)), tmp_path, progress=False) == first
        with pytest.raises(AssertionError, match="measured again"):  # the control: another point is
            sweep_point(network, data, Wanda(Unstructured(0.4)), tmp_path, progress=False)
    assert (tmp_path / "sweep.json").read_bytes() == before
    assert "measured before" in capsys.readouterr().out
    # Other calibration windows are another point, another evaluation text another sweep.
    sweep_point(
        network, make_data(tokenizer, calibration_windows=3), Wanda(Unstructured(0.5)), tmp_path, progress=False
    )
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 2
    other = make_data(tokenizer, evaluation_windows=2)
    with pytest.raises(ValueError, match="holds results of another setting"):
        sweep_point(network, other, Wanda(Unstructured(0.5)), tmp_path, progress=False)
    with pytest.raises(ValueError, match="another setting: model was None and is 'another'. Choose another folder"):
        sweep_point(network, data, Wanda(Unstructured(0.5)), tmp_path, name="another", progress=False)


def test_what_makes_a_point_another_one(tmp_path, tokenizer, data):
    """The sensitivities of an allocation, the path of a text, the tokenizer, the model, the pruner's settings."""
    pruner = Wanda(Unstructured(0.5))
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in ("mlp.up_proj", "mlp.down_proj")]
    for sensitive in (names[0], names[1]):
        allocation = SensitivityAllocation({name: 9.0 if name == sensitive else 1.0 for name in names})
        sweep_point(network, data, pruner, tmp_path / "a", allocation=allocation, targets=names, progress=False)
    assert len({cell["perplexity"] for cell in read(tmp_path / "a").values()}) == 2
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(f"{folder} line of text\n" * 500)
        text = TextFile(str(tmp_path / folder / "x.txt"))
        other = TokenDataModule(
            tokenizer, PythonDocs("train"), text, PythonDocs("evaluation"), seq_len=48, calibration_windows=6,
            train_windows=2, evaluation_windows=3,
        )  # fmt: skip
        sweep_point(network, other, pruner, tmp_path / "t", progress=False)
    assert len({cell["perplexity"] for cell in read(tmp_path / "t").values()}) == 2
    upper = copy.deepcopy(data)
    upper.evaluation_windows = upper.calibration_windows = upper.train_windows = None
    upper.tokenizer = Shifted()
    first = sweep_point(network, data, pruner, tmp_path / "k1", progress=False)
    second = sweep_point(network, upper, pruner, tmp_path / "k2", progress=False)
    assert first["perplexity"] != second["perplexity"]
    seeds = [sweep_point(lambda s=s: tiny_llama(hidden_size=32, layers=2, seed=s), data, pruner, tmp_path / f"s{s}",
                         progress=False)["perplexity"] for s in (0, 1, 2)]  # fmt: skip
    assert len(set(seeds)) == 3
    for variant in ("SM", "MM"):
        sweep_point(network, data, MRP(NM(2, 4), variant=variant), tmp_path / "v", progress=False)
    assert [cell["series"] for cell in read(tmp_path / "v").values()] == ["MRP, N:M", "MRP, N:M, variant=MM"]


def read(folder):
    return json.loads((folder / "sweep.json").read_text())["cells"]


class Shifted:
    """A tokenizer of bytes with other numbers."""

    def get_vocab(self):
        return {"a": 1}

    def __call__(self, text, **settings):
        return {"input_ids": [(byte * 7) % 250 + 3 for byte in text.encode()]}


def test_a_process_keeps_what_another_wrote_meanwhile(tmp_path, data, monkeypatch):
    real = prune_sequentially

    def overlapping(*args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr("prune_callbacks.studies.sweep.prune_sequentially", real)
            sweep_point(network, data, Wanda(Unstructured(0.3)), tmp_path, progress=False)
        return real(network(), *args[1:], **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("prune_callbacks.studies.sweep.prune_sequentially", overlapping)
        sweep_point(network, data, Wanda(Unstructured(0.5)), tmp_path, progress=False)
    assert [cell["at"] for cell in read(tmp_path).values()] == [0.3, 0.5]


def test_a_point_that_fails_is_noted_and_harms_no_other(tmp_path, data, capsys):
    with pytest.raises(ValueError, match="q_proj"):
        sweep_point(network, data, Magnitude(NM(2, 5)), tmp_path, progress=False)
    good = sweep_point(network, data, Magnitude(NM(2, 4)), tmp_path, progress=False)
    fresh = network()
    prune_sequentially(fresh, None, Magnitude(NM(2, 4)), progress=False)
    assert good["perplexity"] == pytest.approx(perplexity(fresh, data.evaluation_windows, progress=False))
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert ["error" in cell for cell in cells.values()] == [True, False]
    capsys.readouterr()
    sweep_table(tmp_path / "sweep.json")
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"failed: Magnitude\(pattern=NM\(n=2, m=5\)\).*needs an input size", printed)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process's peak begin again")
def test_peaks_are_of_each_point():
    big = torch.ones(100_000_000)
    peak = peak_memory(CPU)
    del big
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < peak - 3e8


def test_the_picture_of_numbers_names_and_everything(tmp_path):
    def cell(at, value):
        calibrated = {"calibration": "text", "calibration_windows": 4, "seed": 0}
        measured = {"perplexity": value, "seconds": 1.0, "peak_memory_bytes": 1 << 30}
        return {"series": "one", "at": at} | measured | calibrated

    setting = {"model": "a $model$", "evaluation": "text", "seq_len": 8, "along": "damping"}
    for values in ([1e-4, 1e-2, 1], [32, 128, None], ["c4", "ptb"], [0.5]):
        cells = {str(at): cell(at, 10.0 + i) for i, at in enumerate(values)}
        results = {"setting": setting, "dense": 9.0, "cells": cells | {"bad": cell(values[0], None) | {"series": "x"}}}
        path = tmp_path / f"{len(values)}{values[0]}.png"
        draw_curves(results, path)
        assert matplotlib.image.imread(path).std() > 0.05
        assert [point["at"] for point in curves(results)["one"]] == values


def test_a_sweep_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    arguments = ["--multirun", "recipe=sweep", "pruner=magnitude,sparsegpt", "pattern.sparsity=0.4,0.6", "smoke=true"]
    done = trained(*arguments, f"output_dir={tmp_path / 'whole'}")
    assert len(re.findall(r"perplexity \d", done.output)) == 4
    path = tmp_path / "killed/sweep.json"
    for wanted in (1, 3):
        with started(TRAIN, *arguments, f"output_dir={path.parent}") as process:
            begin = time.monotonic()
            while time.monotonic() - begin < 120 and (
                not path.is_file() or len(json.loads(path.read_text())["cells"]) < wanted
            ):
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait().returncode == -signal.SIGKILL
    measured = json.loads(path.read_text())["cells"]
    assert len(measured) >= 3
    done = trained(*arguments, f"output_dir={path.parent}")
    assert done.output.count("measured before") == len(measured)
    whole, resumed = (json.loads(p.read_text()) for p in (tmp_path / "whole/sweep.json", path))
    assert list(whole["cells"]) == list(resumed["cells"])
    for key, cell in whole["cells"].items():
        assert resumed["cells"][key]["perplexity"] == cell["perplexity"]
    assert "SparseGPT, unstructured" in done.output
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_unknown_pruners_are_refused_before_any_point(tmp_path):
    done = train("--multirun", "recipe=sweep", "pruner=magnitude,wando", f"output_dir={tmp_path / 'a'}")
    assert done.returncode == 1
    assert "Could not find 'pruner/wando'" in done.output
    assert "sparsegpt" in done.output  # what there is
    assert not (tmp_path / "a/sweep.json").exists()


def test_every_point_that_fails_is_named(tmp_path, capsys):
    given = ["--multirun", "recipe=sweep", "pruner=magnitude", "pattern.sparsity=1.5,0.5,2", "smoke=true"]
    done = train(*given, f"output_dir={tmp_path}")
    assert done.returncode == 1
    named = re.findall(r"failed: .*pattern\.sparsity=(\S+) .*must lie in", done.output)
    assert named == ["1.5", "2"]
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 1
    with pytest.raises(SystemExit) as left:
        comparison([str(tmp_path)])
    assert left.value.code == 2
    assert "holds no run but a study, whose results are in sweep.json and sweep.png" in capsys.readouterr().err


ABLATIONS = {
    "ablate_block_size": ("pruner.block_size=64,null", "block size", [64, None]),
    "ablate_damping": ("pruner.damping=1e-2,1", "damping", [0.01, 1]),
    "ablate_calibration_windows": ("data.calibration_windows=2,4", "calibration windows", [2, 4]),
    "ablate_calibration_corpus": (
        "data.calibration=python_docs,text.txt",
        "calibration text",
        ["python_docs", "text.txt"],
    ),
}


@pytest.mark.parametrize("recipe", ABLATIONS)
def test_an_ablation_sweeps_by_itself(tmp_path, recipe):
    values, along, at = ABLATIONS[recipe]
    (tmp_path / "text.txt").write_text("words in a line, and some more of them\n" * 200)
    trained(f"recipe={recipe}", "smoke=true", values, f"output_dir={tmp_path / 'sweep'}", folder=tmp_path)
    results = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert results["setting"]["along"] == along
    assert [cell["at"] for cell in results["cells"].values()] == at
