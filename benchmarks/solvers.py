"""
Time, loss and memory of the solvers, layer by layer, as ratios measured in one run of one process.

    python benchmarks/solvers.py [--windows WINDOWS.safetensors] [--results FILE.json] [--repeats 3] [--quick]

Layers of SmolLM2-135M (every kind, an early, a middle and a late block) with the Grams of their inputs, and layers of
2048 x 2048 and 4096 x 1024 (in x out) with Grams that have a power-law spectrum and outlier features. For each of 50 %,
70 %, 2:4 and 4:8, relative to our SparseGPT on the same layer: the time and the loss of MRP and of ALPS; the time of
SparseGPT written as a loop of rank-1 updates, and of MRP row by row: by one Cholesky factorisation of H_SS for each,
and by eq. 13 as the paper writes it, one inverse of (H^-1)_PP for each (both on a few rows, scaled up). Times are whole
calls of `prune`, factorisation and loss included, the best of the repeats; blocks of 128, the loops and the row-by-row
ways are timed once.

Without --windows the calibration text is CPython's language reference.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracles

from prune_callbacks import ALPS, MRP, NM, Gram, Pruned, SparseGPT, Unstructured
from prune_callbacks.calibration.windows import contiguous_windows
from prune_callbacks.solvers.linalg import DampedGram, damp, quadratic_form
from prune_callbacks.tasks import PythonDocs, smollm2_135m
from prune_callbacks.writing import write_json

BLOCKS = (1, 15, 28)
SYNTHETIC = ((2048, 2048), (4096, 1024))
PATTERNS = {"50 %": Unstructured(0.5), "70 %": Unstructured(0.7), "2:4": NM(2, 4), "4:8": NM(4, 8)}
SAMPLED_ROWS = 8
EXPONENT = 0.7
"""Of the synthetic spectra: Grams of SmolLM2, scaled to a unit diagonal, fall from the 8th to the median eigenvalue
like i^-0.63 (inputs of q_proj and down_proj, block 15) to i^-1.03 (o_proj)."""


def real_layers(windows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, Gram]]:
    model = AutoModelForCausalLM.from_pretrained(smollm2_135m(), dtype=torch.float32).eval()
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"]
    chosen = [name for name in names if int(name.split(".")[2]) in BLOCKS]
    grams = {name: Gram(model.get_submodule(name).in_features) for name in chosen}
    for name, gram in grams.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, gram=gram: gram.update(args[0]))
    with torch.no_grad():
        for batch in windows.split(4):
            model.model(batch)
    for name in chosen:
        yield name.removeprefix("model.layers."), model.get_submodule(name).weight.detach(), grams[name]


def synthetic_layers() -> Iterator[tuple[str, torch.Tensor, Gram]]:
    for size, out in SYNTHETIC:
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
        gram = Gram(size)
        scale = torch.ones(size)
        scale[torch.randperm(size, generator=generator)[:4]] = 20
        gram.matrix = (basis * torch.arange(1, size + 1) ** -EXPONENT) @ basis.T * scale[:, None] * scale
        gram.tokens = 10 * size
        yield f"synthetic {size} x {out}", torch.randn(out, size, generator=generator), gram


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - begin)
    return best, result


def peak_memory(call: Callable[[], Any]) -> int:
    """The most bytes that PyTorch held at once during the call, beyond what it held before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    held = most = 0
    for event in sorted(profile.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def per_row(weight: torch.Tensor, system: DampedGram, keep: torch.Tensor) -> torch.Tensor:
    """Eq. 13 row by row, with a factorisation for each."""
    solved = torch.zeros_like(weight)
    for row, kept, result in zip(weight, keep, solved, strict=True):
        chosen = kept.nonzero()[:, 0]
        factor = torch.linalg.cholesky(system.matrix[chosen[:, None], chosen])
        right = (system.matrix[chosen] @ row)[:, None]
        result[chosen] = torch.cholesky_solve(right, factor)[:, 0]
    return solved


def eq_13(weight: torch.Tensor, inverse: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Eq. 13 as it is written, row by row."""
    solved = weight.clone()
    for row, kept in zip(solved, keep, strict=True):
        gone = (~kept).nonzero()[:, 0]
        row -= row[gone] @ torch.linalg.inv(inverse[gone[:, None], gone]) @ inverse[gone]
    return solved


def measure(weight: torch.Tensor, gram: Gram, pattern: Unstructured | NM, repeats: int, quick: bool) -> dict[str, Any]:
    system = damp(gram.matrix, 0.01)
    methods: dict[str, Any] = {"SparseGPT": SparseGPT(pattern), "MRP-SM (all)": MRP(pattern, block_size=None)}
    if isinstance(pattern, NM):
        methods["MRP-MM (all)"] = MRP(pattern, "MM", block_size=None)
    methods["ALPS"] = ALPS(pattern)
    cell: dict[str, Any] = {}
    results: dict[str, Pruned] = {}
    for name, pruner in methods.items():
        seconds, results[name] = timed(lambda p=pruner: p.prune(weight, gram), repeats)
        peak = peak_memory(lambda p=pruner: p.prune(weight, gram)) / gram.matrix.nbytes
        cell[name] = {"seconds": seconds, "loss": results[name].loss, "peak_over_gram": peak}
    if not quick:
        seconds, blockwise = timed(lambda: MRP(pattern, block_size=128).prune(weight, gram), 1)
        cell["MRP-SM (128)"] = {"seconds": seconds, "loss": blockwise.loss}
    for name, width in ("rank-1 loop, whole width", 0), ("rank-1 loop, in blocks", 128):

        def loop(width: int = width) -> Any:
            factor = damp(gram.matrix, 0.01).inverse_factor
            solved, _ = oracles.sparsegpt_columns(weight, factor, pattern, 128, width)
            return solved, quadratic_form(solved - weight, gram.matrix)

        cell[name] = {"seconds": timed(loop, 1)[0]}
    # The textbook's way, in float64, on rows spread over the layer; also the judge of how exact MRP is.
    mrp = results["MRP-SM (all)"]
    rows = torch.linspace(0, len(weight) - 1, SAMPLED_ROWS).long()
    keep, dense = mrp.keep[rows], weight[rows]
    seconds, _ = timed(lambda: per_row(dense, system, keep), 1)
    cell["Cholesky per row"] = {"seconds": seconds * len(weight) / len(rows), "sampled_rows": len(rows)}
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system.matrix))
    seconds, _ = timed(lambda: eq_13(dense, inverse, keep), 1)
    cell["eq. 13 per row"] = {"seconds": seconds * len(weight) / len(rows), "sampled_rows": len(rows)}
    exact = damp(gram.matrix.double(), 0.01)
    optimum = per_row(dense.double(), exact, keep) - dense
    reached = (mrp.weight[rows] - dense).double()
    cell["MRP-SM (all)"]["excess_on_sampled_rows"] = (
        quadratic_form(reached, exact.matrix) / quadratic_form(optimum, exact.matrix) - 1
    )
    return cell


def print_tables(results: dict[str, Any]) -> None:
    cells = results["cells"]
    methods = list(dict.fromkeys(name for cell in cells.values() for name in cell))
    for title, value in (
        ("time over SparseGPT's", lambda cell, name: cell[name]["seconds"] / cell["SparseGPT"]["seconds"]),
        ("loss over SparseGPT's", lambda cell, name: cell[name]["loss"] / cell["SparseGPT"]["loss"]),
        ("peak memory over the Gram's", lambda cell, name: cell[name]["peak_over_gram"]),
        ("loss above the float64 optimum, %", lambda cell, name: 100 * cell[name]["excess_on_sampled_rows"]),
    ):
        rows = {}
        for key, cell in cells.items():
            row = {}
            for name in methods:
                try:
                    row[name] = value(cell, name)
                except KeyError:
                    continue
            rows[key] = row
        shown = [name for name in methods if any(name in row for row in rows.values())]
        print(f"\n| {title} | " + " | ".join(shown) + " |\n|---" + "|---" * len(shown) + "|")
        for key, row in rows.items():
            print(f"| {key} | " + " | ".join(f"{row[n]:.3g}" if n in row else "" for n in shown) + " |")
        real = [row for key, row in rows.items() if "synthetic" not in key]
        print("| *median, real layers* | " + " | ".join(_summary(real, n, statistics.median) for n in shown) + " |")
        print("| *largest, real layers* | " + " | ".join(_summary(real, n, max) for n in shown) + " |")


def _summary(rows: list[dict[str, float]], name: str, of: Callable[[list[float]], float]) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{of(values):.3g}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=Path, help="safetensors file with `calibration`, (windows, tokens)")
    parser.add_argument("--results", type=Path, default=Path("solvers.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="only layers with this in their name, such as 2048 or o_proj")
    parser.add_argument("--quick", action="store_true", help="without MRP in blocks of 128, which takes the longest")
    arguments = parser.parse_args()
    if arguments.windows:
        windows = load_file(arguments.windows)["calibration"].long()
    else:
        encode = AutoTokenizer.from_pretrained(smollm2_135m()).encode
        windows = contiguous_windows(PythonDocs("train").documents(), encode, 512, limit=32)
    results: dict[str, Any] = {
        "command": " ".join(["python", *(Path(a).name if "/" in a else a for a in sys.argv)]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "calibration": list(windows.shape),
        "cells": {},
    }
    warm = torch.randn(512, 512)
    SparseGPT(NM(2, 4)).prune(warm, _gram_of(warm))
    sources = [synthetic_layers()]
    if "synthetic" not in arguments.only:
        sources.insert(0, real_layers(windows))
    for source in sources:
        for name, weight, gram in source:
            if arguments.only not in name:
                continue
            for label, pattern in PATTERNS.items():
                key = f"{name}, {label}"
                print(key, flush=True)
                results["cells"][key] = measure(weight, gram, pattern, arguments.repeats, arguments.quick)
            write_json(arguments.results, results)
    print_tables(json.loads(arguments.results.read_text()))


def _gram_of(x: torch.Tensor) -> Gram:
    gram = Gram(x.shape[1])
    gram.update(x)
    return gram


if __name__ == "__main__":
    main()
