"""
Seconds, peak memory and perplexity of pruning a whole model, from its folder into another, beside llm-compressor.

    python benchmarks/prune_model.py WINDOWS.safetensors [--rival PYTHON] [--model FOLDER] [--repeats 3]

WINDOWS is a safetensors file of integer token windows, `calibration` and `wikitext2`, both (windows, tokens). PYTHON is
the interpreter of a virtual environment with llmcompressor (pip install llmcompressor, in one of its own: it pins torch
and transformers). Every run is a process of its own that loads the model, prunes it on the same windows and writes it;
tools take turns, and the median is reported. Peak memory is the process's peak resident set. Perplexity is measured
here, of every folder that was written. Results are written after every run; start again, and it goes on.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_callbacks import MRP, Magnitude, SparseGPT, Unstructured, Wanda, prune_sequentially
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.memory import peak_memory
from prune_callbacks.pruners import Pruner
from prune_callbacks.storage.cells import open_results
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import smollm2_135m
from prune_callbacks.writing import write_json

RIVAL = Path(__file__).parent / "prune_model_rival.py"
PRUNERS: dict[str, Pruner] = {
    "Magnitude": Magnitude(Unstructured(0.5)),
    "Wanda": Wanda(Unstructured(0.5)),
    "SparseGPT": SparseGPT(Unstructured(0.5)),
    "MRP, S = all": MRP(Unstructured(0.5), block_size=None),
    "MRP": MRP(Unstructured(0.5)),
}


def child(method: str, model: str, windows: Path, target: Path) -> dict[str, Any]:
    """Our run, in a process of its own."""
    begin = time.perf_counter()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = time.perf_counter()
    report = prune_sequentially(network, load_file(windows)["calibration"].long().split(4), PRUNERS[method])
    pruned = time.perf_counter()
    save_sparse_model(network, report.masks, target)
    seconds = {"load": loaded - begin, "prune": pruned - loaded, "save": time.perf_counter() - pruned}
    return {"seconds": seconds, "peak_bytes": peak_memory(torch.device("cpu"))}


def run(python: str, script: Path, arguments: list[str]) -> dict[str, Any]:
    """What a process reports in its last line, with the seconds from its start to its end."""
    begin = time.perf_counter()
    done = subprocess.run([python, str(script), *arguments], stdout=subprocess.PIPE, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed with {done.returncode}: {done.stdout[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    report["seconds"]["whole process"] = time.perf_counter() - begin
    return report


def measured(folder: Path, windows: torch.Tensor) -> dict[str, float]:
    """Perplexity and zeros of a folder that was written."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = [m.weight for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    zeros = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    return {"perplexity": round(perplexity(network, windows), 3), "zeros": round(zeros, 4)}


def table(cells: dict[str, Any]) -> None:
    print("| method | tool | prune, s | whole process, s | of the rival's | peak, GiB | perplexity |")
    print("|---|---|---|---|---|---|---|")
    for name, cell in cells.items():
        method, tool = name.split(" by ")
        other = cells.get(f"{method} by llm-compressor", cell)
        prune, whole, peak = medians(cell)
        theirs = medians(other)
        ratio = f"{prune / theirs[0]:.2f} / {whole / theirs[1]:.2f}"
        ratio = "-" if other is cell else ratio
        print(f"| {method} | {tool} | {prune:.1f} | {whole:.1f} | {ratio} | {peak:.2f} | {cell['perplexity']:.2f} |")


def medians(cell: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds of pruning and of the whole process, and peak GiB."""
    runs = [(r["seconds"]["prune"], r["seconds"]["whole process"], r["peak_bytes"] / 2**30) for r in cell["runs"]]
    prune, whole, peak = map(statistics.median, zip(*runs, strict=True))
    return prune, whole, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--rival", metavar="PYTHON")
    parser.add_argument("--model", help="a folder; SmolLM2-135M from its PyPI package by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(PRUNERS), choices=list(PRUNERS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/prune_model_smollm2_135m.json")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.model or str(smollm2_135m())
    if args.child:
        print(json.dumps(child(args.child[0], model, args.windows, Path(args.child[1]))))
        return
    windows = load_file(args.windows)
    setting = {"model": Path(model).name} | {name: list(windows[name].shape) for name in ("calibration", "wikitext2")}
    results = open_results(args.results, setting)
    results |= {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    for repeat in range(args.repeats):
        for method in args.methods:
            for tool in ("prune-callbacks", "llm-compressor"):
                rival = tool == "llm-compressor"
                if rival and (args.rival is None or method not in ("Wanda", "SparseGPT")):
                    continue
                cell = results["cells"].setdefault(f"{method} by {tool}", {"runs": []})
                if len(cell["runs"]) > repeat:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    if rival:
                        report = run(args.rival, RIVAL, [method, model, str(args.windows), folder])
                        results["rival"] = report.pop("versions")
                        written = Path(folder)
                    else:
                        given = [str(args.windows), "--model", model, "--child", method, folder]
                        report = run(sys.executable, Path(__file__), given)
                        written = Path(folder) / "model"
                    if "perplexity" not in cell:
                        cell |= measured(written, windows["wikitext2"].long())
                        results["cells"][f"{method} by {tool}"] = cell
                cell["runs"].append(report)
                write_json(args.results, results)
    table(results["cells"])


if __name__ == "__main__":
    main()
