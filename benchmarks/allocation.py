"""
Perplexity of Wanda at 60 % by how the sparsity is spread over layers, and how well losses predict sensitivities.

    python benchmarks/allocation.py WINDOWS.safetensors [--model FOLDER_OR_HUB_ID] [--results FILE.json]

WINDOWS is a safetensors file of integer token windows: `calibration` and one tensor to evaluate on (`wikitext2`), both
(windows, tokens). Sensitivities are measured on calibration windows, so the evaluation text decides nothing. Results
are written after every cell and every block; run again, and what is finished is not measured twice.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_callbacks import OWL, LagrangianAllocation, Unstructured, Wanda, prune_sequentially
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.storage.cells import open_results
from prune_callbacks.studies import sensitivity
from prune_callbacks.tasks import smollm2_135m
from prune_callbacks.writing import write_json

EXACT = "uniform, rows that differ by one weight"
"""Wanda's convention rounds in every row; this rounds in every layer, which is nearer to the allocations' total."""
ALLOCATIONS = {
    "uniform": lambda path: None,
    EXACT: lambda path: None,
    "OWL": lambda path: OWL(),
    "Lagrangian": lambda path: LagrangianAllocation(),
    "Lagrangian, reach 0.3": lambda path: LagrangianAllocation(reach=0.3, points=5),
    "Lagrangian, weighted by measured blocks": lambda path: LagrangianAllocation.from_file(path),
    "Lagrangian, weighted by measured blocks, reach 0.3": lambda path: LagrangianAllocation.from_file(path, 0.3, 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--model", help="a causal LM; SmolLM2-135M from its PyPI package by default")
    parser.add_argument("--evaluation", default="wikitext2")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--sensitivity-windows", type=int, default=4)
    parser.add_argument("--matmul-precision", default="highest", choices=("highest", "high", "medium"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/allocation_smollm2_135m.json")
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.matmul_precision)
    path, windows = args.model or smollm2_135m(), load_file(args.windows)
    calibration, evaluation = windows["calibration"].long(), windows[args.evaluation].long()
    pruner = Wanda(Unstructured(args.sparsity))
    setting: dict[str, Any] = {
        "model": Path(path).name,
        "pruner": repr(pruner),
        "calibration": list(calibration.shape),
        args.evaluation: list(evaluation.shape),
        "matmul_precision": args.matmul_precision,
        "sensitivity_windows": args.sensitivity_windows,
    }
    results = open_results(args.results, setting)
    results |= {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    units = args.results.with_name(f"{args.results.stem}_blocks.json")
    measured = sensitivity(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        calibration.split(4),
        calibration[: args.sensitivity_windows],
        pruner,
        unit="block",
        path=units,
        setting=setting,
    )
    results["spearman_blocks"] = {
        "loss": round(measured.rank_correlation, 3),
        "shift": round(measured.shift_rank_correlation, 3),
    }
    for name, make in ALLOCATIONS.items():
        if name not in results["cells"]:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            how = Wanda(Unstructured(args.sparsity, per="even")) if name == EXACT else pruner
            report = prune_sequentially(model, calibration.split(4), how, allocation=make(units))
            removed = sum(int((~keep).sum()) for keep in report.masks.values())
            results["cells"][name] = {
                "perplexity": round(perplexity(model, evaluation), 3),
                "removed": removed,
                "seconds": round(report.seconds, 1),
                "sparsity": {layer.name: round(layer.sparsity, 4) for layer in report.layers},
            }
            write_json(args.results, results)
    uniform = results["cells"][EXACT]["perplexity"]
    print("| allocation | perplexity | of uniform | weights removed |\n|---|---|---|---|")
    for name, cell in results["cells"].items():
        value = cell["perplexity"]
        print(f"| {name} | {value:.2f} | {value / uniform:.3f} | {cell['removed']:,} |")
    print(f"rank correlation (Spearman) with a block's measured sensitivity: {results['spearman_blocks']}")


if __name__ == "__main__":
    main()
