"""The benchmark scripts, on shapes that take no time: that they run, and measure what they say."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiers import slow

from prune_callbacks import (
    ALPS,
    NM,
    BlockReconstruction,
    Gram,
    MeasuredAllocation,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.solvers.linalg import damp
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import tiny_llama

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
def test_solvers_measures_time_loss_memory_and_exactness(correlated, pattern, capsys):
    bench = load("solvers")
    gram = Gram(96)
    gram.update(correlated(96, tokens=400).float())
    weight = torch.randn(24, 96)
    cell = bench.measure(weight, gram, pattern, repeats=1, quick=False)
    methods = ["SparseGPT", "MRP-SM (all)", "MRP-SM (128)", "ALPS"] + ["MRP-MM (all)"] * isinstance(pattern, NM)
    assert set(methods) < set(cell)
    assert all(entry["seconds"] > 0 for entry in cell.values())
    assert cell["ALPS"]["loss"] < cell["SparseGPT"]["loss"]
    keep = torch.rand(3, 96) > 0.5
    system = damp(gram.matrix.double(), 0.01)
    by_row = bench.per_row(weight[:3].double() * ~system.dead, system, keep)
    inverse = torch.linalg.inv(system.matrix)
    torch.testing.assert_close(bench.eq_13(weight[:3].double() * ~system.dead, inverse, keep), by_row)
    assert -1e-5 < cell["MRP-SM (all)"]["excess_on_sampled_rows"] < 1e-3
    # Of any method at least the new weights and the damped Gram, with its factor, are held at once.
    assert cell["SparseGPT"]["peak_over_gram"] > 2 + 24 / 96
    bench.print_tables({"cells": {"0.a, 50 %": cell, "synthetic": cell}})
    assert "loss over SparseGPT's" in capsys.readouterr().out


def test_peak_memory_sees_what_is_freed_again():
    bench = load("solvers")

    def work():
        for _ in range(3):
            (torch.zeros(1000, 250) + 1).sum()

    assert 2_000_000 <= bench.peak_memory(work) < 3_000_000


def test_prune_llama7b_prunes_every_layer_and_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    bench, results = load("prune_llama7b"), tmp_path / "r.json"
    small = "--device cpu --dtype float32 --layers 1 --hidden-size 128 --intermediate-size 192 --windows 4 --length 64"
    monkeypatch.setattr(sys, "argv", ["x", *small.split(), "--batch-size", "2", "--results", str(results)])
    bench.main()
    cells = json.loads(results.read_text())["cells"]
    assert set(cells) == {f"{m}, {p}" for m in ("Wanda", "SparseGPT", "MRP", "ALPS") for p in ("50 %", "2:4")}
    assert all(cell["prune_seconds"] >= cell["solver_seconds"] >= 0 for cell in cells.values())
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured again"))
    bench.main()
    monkeypatch.setattr(sys, "argv", ["x", "--results", str(results)])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench.main()
        assert "no CUDA device was found" in capsys.readouterr().err


def test_reconstruction_measures_its_starts_and_goes_on_where_it_stopped(tmp_path, tokenizer, capsys, monkeypatch):
    bench = load("reconstruction")
    once = bench.Setting(BlockReconstruction(passes=1), written=3)
    monkeypatch.setattr(bench, "SETTINGS", {"alone": bench.Setting(None), "reconstruction": once})
    monkeypatch.setitem(bench.STARTS, "Wanda, allocated", (Wanda(Unstructured(0.5)), MeasuredAllocation()))
    tiny_llama(hidden_size=32, layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["".join(f"{n} times {m} is {n * m}\n" for n in range(40)) for m in range(6)]
    windows = torch.stack([torch.tensor(tokenizer(text)["input_ids"][:32]) for text in texts[:4]])
    save_file({"calibration": windows, "wikitext2": windows[:2].clone()}, tmp_path / "windows.safetensors")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["reconstruction.py", "windows.safetensors", "--model", "model", "--held-out", "text.jsonl"]
    command += [
        "--starts",
        "Wanda 2:4",
        "SparseGPT 2:4",
        "Wanda, allocated",
        "--results",
        "results.json",
        "--save",
        "models",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["setting"]["texts"]["held_out"] == [2, 32]  # not the documents of the calibration windows
    cells = results["cells"]
    assert len(cells) == 7
    assert cells["Wanda, allocated, alone"]["seconds"]["allocation"] > 0
    assert load_file(next((tmp_path / "models").glob("written_3_*.safetensors")))["windows"].shape == (3, 32)
    for start in ("Wanda 2:4", "SparseGPT 2:4"):
        alone, after = (cells[f"{start}, {name}"] for name in ("alone", "reconstruction"))
        assert (len(alone["blocks"]), len(after["blocks"])) == (0, 2)
        assert alone["seconds"]["reconstruction"] == 0 <= after["seconds"]["reconstruction"] <= after["seconds"]["all"]
        assert (alone["written"], after["written"]) == (0, 3)
        assert alone["seconds"]["writing"] == alone["seconds"]["allocation"] == 0
        assert alone["held_out"] != after["held_out"]
        assert (tmp_path / "models" / f"{start}, reconstruction".replace(" ", "_") / "masks.safetensors").exists()
    assert "| Wanda 2:4, reconstruction |" in capsys.readouterr().out
    monkeypatch.setattr(bench, "run", None)  # nothing is left to measure
    bench.main()


def test_the_search_runs_every_form_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # it shares functions with the script beside it
    bench = load("reconstruction_search")
    monkeypatch.setattr(
        bench,
        "FORMS",
        {name: replace(form, learning_rate=form.learning_rate * 5) for name, form in bench.FORMS.items()},
    )
    model = tiny_llama(hidden_size=32, layers=3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
    model.save_pretrained(tmp_path / "model")
    windows = torch.randint(3, 200, (6, 32), generator=torch.Generator().manual_seed(0))
    save_file({"calibration": windows, "wikitext2": windows[:4].clone()}, tmp_path / "windows.safetensors")
    command = ["reconstruction_search.py", str(tmp_path / "windows.safetensors"), "--model", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", [*command, "--blocks", "2", "--results", str(tmp_path / "results.json")])
    bench.main()
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert list(cells) == list(bench.FORMS)
    assert len({cell["wikitext2"] for cell in cells.values()}) == len(cells)  # no two are the same training
    monkeypatch.setattr(bench, "reconstructed", None)  # nothing is left to train
    bench.main()


@pytest.mark.parametrize("settings", [{}, {"batch": 4}, {"passes": 0}], ids=str)
def test_the_searched_form_is_the_librarys(settings, tmp_path, monkeypatch):
    """Trains one block by the script's loop and by the library, which take other orders of the windows."""
    monkeypatch.syspath_prepend(FOLDER)
    bench = load("reconstruction_search")
    tiny_llama(hidden_size=32, layers=2).save_pretrained(tmp_path / "model")
    windows = torch.randint(3, 200, (16, 32), generator=torch.Generator().manual_seed(0))
    form = bench.Form(**settings)
    searched = bench.reconstructed(str(tmp_path / "model"), form, 1, windows)
    dense = tiny_llama(hidden_size=32, layers=2)
    library, control = copy.deepcopy(dense), copy.deepcopy(dense)
    own = BlockReconstruction(passes=3, held_out=0, batch_size=form.batch)
    targets = "model.layers.0.*"
    for model, reconstruction in ((library, own), (control, None)):
        prune_sequentially(
            model, windows.split(1), ALPS(NM(2, 4)), targets=targets, reconstruction=reconstruction, progress=False
        )

    def error(model):
        with torch.no_grad():
            output, target = (
                m.model(windows, use_cache=False, output_hidden_states=True).hidden_states[1] for m in (model, dense)
            )
        return float(((output - target).square().sum(-1) / target.square().sum(-1)).mean())

    assert error(library) < 0.9 * error(control)
    close = abs(error(searched) / error(library) - 1) < 0.03
    assert close is (form.passes > 0), (error(searched), error(library), error(control))


def test_recovery_trains_every_method_and_goes_on_where_it_stopped(tmp_path, tokenizer, capsys, monkeypatch):
    bench = load("recovery")
    # A random model learns next to nothing of its like at the rates for a trained one.
    faster = {
        name: (objective, masked, [50 * rate for rate in rates])
        for name, (objective, masked, rates) in bench.METHODS.items()
    }
    monkeypatch.setattr(bench, "METHODS", faster)
    tiny_llama(hidden_size=32, layers=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(800)))
    save_file({"wikitext2": torch.randint(3, 200, (2, 32))}, tmp_path / "windows.safetensors")
    command = ["recovery.py", "text.txt", "windows.safetensors", "--model", "model", "--rates", "1", "--rank", "4"]
    command += ["--train-windows", "4", "--seq-len", "32", "--calibration-windows", "8"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    cells = json.loads((tmp_path / "recovery.json").read_text())["cells"]
    assert len(cells) == 2 + len(bench.METHODS)
    trained = [cell for key, cell in cells.items() if "lr" in key]
    assert all(cell["held_out"] < cells["pruned"]["held_out"] for cell in trained)
    assert len({cell["held_out"] for cell in trained}) == len(trained)  # no two are the same training
    assert capsys.readouterr().out.count("| masked LoRA, text |") == 1
    monkeypatch.setattr(bench, "train", None)  # nothing is left to train
    bench.main()
    monkeypatch.setattr(sys, "argv", [*command, "--train-windows", "5"])
    with pytest.raises(ValueError, match="holds results of another setting"):
        bench.main()


def test_recovery_per_token_trains_from_every_start_and_goes_on(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    bench = load("recovery_per_token")
    monkeypatch.setattr(bench, "LENGTH", 32)
    monkeypatch.setitem(bench.METHODS, "masked LoRA, text and logits", ("text and logits", True, [0.02, 0.05]))
    dense = tiny_llama(hidden_size=32, layers=2)
    dense.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = {}
    for pruner in (Wanda(NM(2, 4)), ALPS(Unstructured(0.5))):
        model, name = copy.deepcopy(dense), f"{type(pruner).__name__} alone"
        report = prune_sequentially(model, list(torch.randint(3, 200, (4, 2, 32))), pruner, progress=False)
        save_sparse_model(model, report.masks, tmp_path / name.replace(" ", "_"))
        made[name] = {"seconds": {"all": 60.0}}
    (tmp_path / "made.json").write_text(json.dumps({"cells": made | {"dense": {}}}))
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(800)))
    save_file({"wikitext2": torch.randint(3, 200, (2, 32))}, tmp_path / "windows.safetensors")
    command = ["x", "text.txt", "windows.safetensors", "--starts", "Wanda_alone", "ALPS_alone", "--tokens", "64", "256"]
    command += ["--model", "model", "--made", "made.json", "--results", "r.json"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    cells = json.loads((tmp_path / "r.json").read_text())["cells"]
    trained = {key: cell for key, cell in cells.items() if "tokens" in cell}
    assert len(cells) == 3 + len(trained)
    assert sorted((cell["start"], cell["tokens"]) for cell in trained.values()) == [
        *[("ALPS alone", 64)] * 2,
        ("ALPS alone", 256),
        *[("Wanda alone", 64)] * 2,
        ("Wanda alone", 256),
    ]
    for start in made:
        few, many = (bench.best_of(cells, start, count)["held_out"] for count in (64, 256))
        assert many < few < cells[start]["held_out"]
    known = {"dense": {"reported": 25.0}, "x": {"reported": 100.0, "minutes": 2.0}}
    known |= {str(n): {"start": "x", "tokens": 64, "held_out": n, "reported": 50.0 + n, "seconds": 6} for n in (0, 1)}
    assert "| x | 2.0 | 100.00 | 50.00 (50%, 0.1 min) |" in bench.recovered(known)
    printed = capsys.readouterr().out
    assert "| Wanda alone | 1.0 |" in printed
    assert (tmp_path / "r.png").stat().st_size > 10_000
    monkeypatch.setattr(bench, "train", None)  # nothing is left to train
    bench.main()
    monkeypatch.setattr(sys, "argv", [*command, "--starts", "other"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "does not say how ['other'] were made" in capsys.readouterr().err


def test_enforcer_measures_the_step_its_share_and_its_memory(tmp_path, monkeypatch):
    bench, output = load("enforcer"), tmp_path / "enforcer.json"
    arguments = ["--model", "tiny", "--batch", "1", "--tokens", "16", "--steps", "4", "--output", str(output)]
    for _ in range(2):  # the second takes the place of the first
        monkeypatch.setattr(sys, "argv", ["enforcer.py", *arguments])
        bench.main()
    (row,) = json.loads(output.read_text())
    assert 0 < row["share_of_step"] <= row["largest_share"] < 1
    assert row["step_seconds_with"] > 0
    assert row["bits_per_weight_here"] == 1
    assert row["mask_bytes_here"] == 4 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 384 * 128) // 8


@pytest.mark.slow
def test_deployment_measures_every_cell_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, tokenizer):
    bench = load("deployment")
    tiny_llama(hidden_size=32, layers=2).save_pretrained(tmp_path / "model")
    windows = {name: torch.randint(3, 200, (8, 32)) for name in ("calibration", "wikitext2")}
    save_file(windows, tmp_path / "w.safetensors")
    command = ["deployment.py", str(tmp_path / "w.safetensors"), "--model", str(tmp_path / "model")]
    command += ["--results", str(tmp_path / "r.json"), "--matmul-precision", "highest", "--only"]
    names = [name for name in bench.CELLS if "MRP" not in name and "50 %" not in name]
    monkeypatch.setattr(sys, "argv", [*command, *names])
    bench.main()
    cells = json.loads((tmp_path / "r.json").read_text())["cells"]
    assert list(cells) == names
    losses = cells["same Gram"]["losses"]
    assert len(losses) == 14
    assert {name for name, one in losses.items() if "Wanda, permuted" in one} == {n for n in losses if "down_proj" in n}
    assert all(one["Wanda, permuted"] < one["Wanda"] for one in losses.values() if "Wanda, permuted" in one)
    assert all(one["rounded to nearest"] > one["SparseGPT"] for one in losses.values())
    assert cells["Wanda 2:4, permuted"]["logits_change"]["float64"] < 1e-10
    assert cells["Wanda 2:4"]["compression_fp16"]["packed_over_dense"] == 0.5625
    small = cells["shrunk 25 %, loss"]
    assert small["perplexity_shrunk"] == pytest.approx(small["perplexity"], abs=0.002)
    assert small["bytes"]["whole"] - small["bytes"]["shrunk"] == pytest.approx(
        4 * (small["parameters"]["whole"] - small["parameters"]["shrunk"]), abs=2000
    )
    output = capsys.readouterr().out
    assert "| joint / rounded to nearest |" in output
    assert "whole window, all logits" in output
    monkeypatch.setattr(bench, "CELLS", dict.fromkeys(bench.CELLS))  # nothing is measured again
    bench.main()


def test_allocation_meets_one_total_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    bench = load("allocation")
    tiny_llama(hidden_size=32, layers=3).save_pretrained(tmp_path / "model")
    windows = {name: torch.randint(3, 200, (8, 32)) for name in ("calibration", "wikitext2")}
    save_file(windows, tmp_path / "w.safetensors")
    command = ["allocation.py", str(tmp_path / "w.safetensors"), "--model", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(tmp_path / "r.json")])
    bench.main()
    cells = json.loads((tmp_path / "r.json").read_text())["cells"]
    assert list(cells) == list(bench.ALLOCATIONS)
    assert {cell["removed"] for name, cell in cells.items() if not name.startswith("uniform")} == {
        round(0.6 * 3 * 12288)
    }
    assert abs(cells[bench.EXACT]["removed"] - round(0.6 * 3 * 12288)) <= 3 * 7 / 2  # every layer rounds by itself
    assert len(json.loads((tmp_path / "r_blocks.json").read_text())["cells"]) == 3
    assert "rank correlation (Spearman)" in capsys.readouterr().out
    monkeypatch.setattr(bench, "prune_sequentially", None)  # nothing is measured again
    bench.main()


def test_scaling_prints_every_shape_and_its_counts_order_the_measured_layers(monkeypatch, capsys):
    bench = load("scaling")
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    bench.main()
    printed = capsys.readouterr().out
    document = (Path(__file__).parent.parent / "docs/scaling.md").read_text()
    assert printed.strip() in document  # the tables are those that the command makes
    llama = bench.SHAPES[0]
    assert llama.weights * llama.blocks == pytest.approx(6.476e9, rel=1e-3)  # 6.74 billion less embeddings and head
    assert bench.block_seconds(llama, "MRP", 4, 4e13, 0) < bench.block_seconds(llama, "MRP", 1, 4e13, 0)


WORKSPACE = """
import sys, torch
from prune_callbacks import ALPS, MRP, Gram, SparseGPT, Unstructured
from prune_callbacks.solvers.least_squares import MaskedLeastSquares
from prune_callbacks.sparsity.selection import keep_largest

torch.manual_seed(0)

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

out, size = map(int, sys.argv[1:])
small, gram, weight = Gram(64), Gram(size), torch.randn(out, size)
small.update(torch.randn(128, 64))
gram.update(torch.randn(2 * size, size))
def measured(run, small, large):
    run(*small)  # libraries are loaded now
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    before = memory("VmRSS:")
    result = run(*large)
    print(memory("VmHWM:") - before)

for pruner in (SparseGPT, lambda pattern: MRP(pattern, block_size=None), ALPS):
    measured(pruner(Unstructured(0.5)).prune, (torch.randn(8, 64), small), (weight, gram))
MaskedLeastSquares.penalty = lambda self: self.loss.new_tensor([1e9])  # the search never surely wins
measured(ALPS(Unstructured(0.5)).prune, (torch.randn(8, 64), small), (weight, gram))
scores = weight.flatten()
scores[:100] = scores.kthvalue(len(scores) // 2 + 1).values  # tied with the last that is kept
measured(keep_largest, (torch.ones(4), 2), (scores, len(scores) // 2))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
@pytest.mark.parametrize(("out", "size"), [slow(512, 2048), slow(1536, 1536), slow(3072, 768)])
def test_what_scaling_counts_for_a_solver_is_what_it_takes(out, size):
    bench = load("scaling")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKSPACE, str(out), str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *peaks, selecting = map(int, done.stdout.split())
    for method, peak in zip(("SparseGPT", "MRP, S = all", "ALPS", "ALPS"), peaks, strict=True):
        assert 0.7 * bench.workspace(method, out, size) < peak < 1.1 * bench.workspace(method, out, size) + 2**23
    assert peaks[3] < 1.15 * peaks[2]  # a second solve does not come on top of the first one's arrays
    assert selecting < 1.75 * 4 * out * size + 2**22  # a copy of the scores, and the mask, ties or none


@pytest.mark.slow
def test_whole_models_are_pruned_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    bench = load("prune_model")
    tiny_llama(hidden_size=32, layers=2).save_pretrained(tmp_path / "model")
    windows = {name: torch.randint(3, 200, (8, 32)) for name in ("calibration", "wikitext2")}
    save_file(windows, tmp_path / "w.safetensors")
    rival = tmp_path / "rival.py"  # stands for the other tool: writes the dense model
    rival.write_text(
        "import json, sys; from transformers import AutoModelForCausalLM as A\n"
        "A.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[4])\n"
        "print(json.dumps({'seconds': {'load': 1, 'prune': 2, 'save': 1}, 'peak_bytes': 2**30, 'versions': {}}))"
    )
    monkeypatch.setattr(bench, "RIVAL", rival)
    command = ["prune_model.py", str(tmp_path / "w.safetensors"), "--model", str(tmp_path / "model"), "--repeats", "1"]
    command += ["--rival", sys.executable, "--methods", "Wanda", "--results", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    cells = json.loads((tmp_path / "r.json").read_text())["cells"]
    assert cells["Wanda by prune-callbacks"]["zeros"] == 0.5
    assert cells["Wanda by llm-compressor"]["zeros"] == 0.0
    assert cells["Wanda by prune-callbacks"]["runs"][0]["peak_bytes"] > 1e8
    monkeypatch.setattr(bench, "run", None)  # nothing is run again
    bench.main()
    assert "| Wanda | prune-callbacks |" in capsys.readouterr().out


def test_the_tables_of_the_docs_are_those_of_the_results():
    tables = load("tables")
    marks = [mark for page in tables.PAGES for mark in tables.MARK.findall(page.read_text())]
    assert {name for _, name, _ in marks} == set(tables.TABLES)
    for page in tables.PAGES:
        assert tables.written(page.read_text()) == page.read_text(), f"run python benchmarks/tables.py: {page.name}"


def test_a_table_that_was_typed_is_made_anew(monkeypatch):
    tables = load("tables")
    monkeypatch.setattr(tables, "TABLES", {"one-two": lambda: "| a |\n|---|\n"})
    page = "before\n<!-- one-two -->\n| typed |\n<!-- end of one-two -->\nafter <!-- other\n"
    assert tables.written(page) == "before\n<!-- one-two -->\n| a |\n|---|\n<!-- end of one-two -->\nafter <!-- other\n"
    with pytest.raises(KeyError, match="three"):
        tables.written("<!-- three -->\n<!-- end of three -->")
