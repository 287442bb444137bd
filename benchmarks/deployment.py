"""
What permuting, rounding and shrinking cost and save, on fixed token windows.

    python benchmarks/deployment.py WINDOWS.safetensors [--model FOLDER_OR_HUB_ID] [--results FILE.json]

WINDOWS is a safetensors file of integer token windows: `calibration` and one tensor to evaluate on (`wikitext2`), both
(windows, tokens). Measures perplexities and file sizes, and for every layer, with the same Gram for all that are
compared, the loss of Wanda's 2:4 before and after permuting, and of SparseGPT and rounding to 4 bits, one after the
other and together. Prints Markdown tables. Results are written after every cell; run again, and finished cells are not
measured twice.
"""

import argparse
import copy
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prune_callbacks import (
    GPTQ,
    MRP,
    NM,
    Columns,
    Gram,
    Grid,
    Pruned,
    SparseGPT,
    SparseGPTQ,
    Structured,
    Unstructured,
    Wanda,
    permute_channels_,
    prune_sequentially,
    save_compressed,
    shrink,
)
from prune_callbacks.deploy.latency import model_sweep
from prune_callbacks.deploy.shrinking import logits_difference
from prune_callbacks.deploy.timing import time_in_turns
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.solvers.gptq import round_to_nearest
from prune_callbacks.solvers.permutation import channel_permutation
from prune_callbacks.storage.cells import open_results
from prune_callbacks.tasks import smollm2_135m
from prune_callbacks.writing import write_json

PATTERN = NM(2, 4)
GRID = Grid(bits=4, group_size=128)
QUARTER = Columns(0.25)

Cell = dict[str, Any]


@dataclass(frozen=True)
class RoundedToNearest:
    """SparseGPT, then every survivor at the nearest point of its group's grid: nothing makes up for the rounding."""

    pattern: NM = PATTERN

    def statistic(self, in_features: int, device: Any = None) -> Gram:
        return Gram(in_features, device)

    def prune(self, weight: Tensor, statistic: Any) -> Pruned:
        pruned = SparseGPT(self.pattern).prune(weight, statistic)
        rounded, scale = round_to_nearest(pruned.weight, GRID)
        return Pruned(rounded, pruned.keep, loss_of(rounded - weight, statistic.matrix), scale.half())


@dataclass(frozen=True)
class Compared:
    """Prunes by Wanda; notes what others would have lost on the same layer with the same Gram."""

    channels: int
    """Of the MLPs: the layer that reads so many features is the one whose inputs may be permuted."""
    losses: list[dict[str, float]] = field(default_factory=list)
    pattern: NM = PATTERN

    def statistic(self, in_features: int, device: Any = None) -> Gram:
        return Gram(in_features, device)

    def prune(self, weight: Tensor, statistic: Any) -> Pruned:
        pruned = Wanda(self.pattern).prune(weight, statistic)
        losses = {
            "Wanda": pruned.loss,
            "SparseGPT": SparseGPT(self.pattern).prune(weight, statistic).loss,
            "rounded to nearest": RoundedToNearest().prune(weight, statistic).loss,
            "GPTQ after": GPTQ(SparseGPT(self.pattern), GRID).prune(weight, statistic).loss,
            "joint": SparseGPTQ(self.pattern, GRID).prune(weight, statistic).loss,
        }
        if len(statistic.matrix) == self.channels:
            losses["Wanda, permuted"] = permuted_loss(weight, statistic.matrix)
        self.losses.append({name: float(loss) for name, loss in losses.items() if loss is not None})
        return pruned


def loss_of(change: Tensor, gram: Tensor) -> float:
    return float(torch.linalg.vecdot(change.double() @ gram.double(), change.double()).sum())


def permuted_loss(weight: Tensor, gram: Tensor) -> float:
    order = channel_permutation((weight**2) * gram.diagonal(), PATTERN.n, PATTERN.m)
    moved = Gram(len(gram))
    moved.matrix, moved.tokens = gram[order][:, order].contiguous(), 1
    loss = Wanda(PATTERN).prune(weight[:, order].contiguous(), moved).loss
    assert loss is not None
    return loss


def pruned(model: Any, windows: Any, pruner: Any) -> Any:
    return prune_sequentially(model, windows["calibration"].long().split(4), pruner)


def dense(model: Any, windows: Any) -> Cell:
    return {}


def one_shot(pruner: Any) -> Callable[[Any, Any], Cell]:
    def measure(model: Any, windows: Any) -> Cell:
        report = pruned(model, windows, pruner)
        with tempfile.TemporaryDirectory() as folder:
            grid = GRID if report.scales else None
            packing = pruner.pattern if isinstance(pruner.pattern, NM) else None
            saved = (report.masks, folder + "/model")
            size = save_compressed(model, *saved, pattern=packing, scales=report.scales, grid=grid)
            half = None if grid else save_compressed(copy.deepcopy(model).half(), *saved, pattern=packing).to_dict()
        return {"compression": size.to_dict(), "compression_fp16": half, "prune_seconds": round(report.seconds, 1)}

    return measure


def compared(model: Any, windows: Any) -> Cell:
    probe = Compared(model.config.intermediate_size)
    report = pruned(model, windows, probe)
    names = [layer.name for layer in report.layers]
    return {"losses": dict(zip(names, probe.losses, strict=True))}


def permuted(model: Any, windows: Any) -> Cell:
    tokens = windows["calibration"][:1].long()
    before = copy.deepcopy(model)
    done = permute_channels_(model, windows["calibration"].long().split(4), PATTERN)
    precision = torch.get_float32_matmul_precision()
    change = {f"float32, {precision}": logits_difference(before, model, tokens)}
    torch.set_float32_matmul_precision("highest")
    change["float32, highest"] = logits_difference(before, model, tokens)
    torch.set_float32_matmul_precision(precision)
    change["float64"] = logits_difference(before.double(), copy.deepcopy(model).double(), tokens)
    largest = float(before(tokens).logits.abs().max())
    pruned(model, windows, Wanda(PATTERN))
    shares = {name: [gain.before, gain.after] for name, gain in done.items()}
    return {"kept_score": shares, "logits_change": change, "largest_logit": largest}


def shrunk(pruner: Any) -> Callable[[Any, Any], Cell]:
    def measure(model: Any, windows: Any) -> Cell:
        report = pruned(model, windows, pruner)
        smaller = shrink(model, report.masks)
        with tempfile.TemporaryDirectory() as folder:
            sizes = {}
            for name, one in (("whole", model), ("shrunk", smaller)):
                one.save_pretrained(f"{folder}/{name}")
                sizes[name] = sum(f.stat().st_size for f in Path(folder, name).glob("*.safetensors"))
        return {
            "bytes": sizes,
            "parameters": {"whole": count(model), "shrunk": count(smaller)},
            "logits_difference": logits_difference(model, smaller, windows["calibration"][:1].long()),
            "perplexity_shrunk": round(perplexity(smaller, windows["wikitext2"]), 3),
            "prune_seconds": round(report.seconds, 1),
        }

    return measure


def speed(model: Any, windows: Any) -> Cell:
    """Dense and shrunk in turns: whole windows with all logits, and prefill and decode."""
    whole = copy.deepcopy(model)
    report = pruned(model, windows, Structured(QUARTER, score="wanda"))  # what goes does not change the speed
    models = {"dense": whole, "shrunk": shrink(model, report.masks)}
    tokens = windows["calibration"][:1].long()
    with torch.inference_mode():
        calls = {name: partial(one, tokens) for name, one in models.items()}
        timings = time_in_turns(calls, torch.device("cpu"), repeats=20)
    return {
        "whole_windows": {name: vars(timing) for name, timing in timings.items()},
        "cells": model_sweep(models, batches=(1, 4), prompt_tokens=(16, 128, 512), repeats=10),
    }


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


CELLS: dict[str, Callable[[Any, Any], Cell]] = {
    "dense": dense,
    "same Gram": compared,
    "Wanda 2:4": one_shot(Wanda(PATTERN)),
    "Wanda 2:4, permuted": permuted,
    "SparseGPT 2:4": one_shot(SparseGPT(PATTERN)),
    "SparseGPT 2:4, int4 to nearest": one_shot(RoundedToNearest()),
    "SparseGPT 2:4, GPTQ int4": one_shot(GPTQ(SparseGPT(PATTERN), GRID)),
    "SparseGPT and int4 together, 2:4": one_shot(SparseGPTQ(PATTERN, GRID)),
    "MRP 2:4, GPTQ int4": one_shot(GPTQ(MRP(PATTERN), GRID)),
    "GPTQ int4": one_shot(GPTQ(grid=GRID)),
    "SparseGPT and int4 together, 50 %": one_shot(SparseGPTQ(Unstructured(0.5), GRID)),
    "shrunk 25 %, loss": shrunk(Structured(QUARTER)),
    "shrunk 25 %, wanda": shrunk(Structured(QUARTER, score="wanda")),
    "speed": speed,
}


def print_tables(results: dict[str, Any]) -> None:
    cells = results["cells"]
    print("\n| | perplexity | bits a weight | file, MB |\n|---|---|---|---|")
    for name, cell in cells.items():
        size = cell.get("compression")
        bits, file = (f"{size['effective_bits']:.2f}", f"{size['file_bytes'] / 1e6:.1f}") if size else ("", "")
        if name not in ("same Gram", "speed"):
            print(f"| {name} | {cell['perplexity']:.2f} | {bits} | {file} |")
    if "speed" in cells:
        print_speed(cells["speed"])
    if "same Gram" not in cells:
        return
    print("\n| loss over | median | least | largest | layers |\n|---|---|---|---|---|")
    for above, below in (
        ("Wanda, permuted", "Wanda"),
        ("rounded to nearest", "SparseGPT"),
        ("GPTQ after", "rounded to nearest"),
        ("joint", "rounded to nearest"),
    ):
        ratios = sorted(one[above] / one[below] for one in cells["same Gram"]["losses"].values() if above in one)
        middle = ratios[len(ratios) // 2]
        print(f"| {above} / {below} | {middle:.3f} | {ratios[0]:.3f} | {ratios[-1]:.3f} | {len(ratios)} |")


def print_speed(cell: Cell) -> None:
    print("\n| shrunk over dense | dense, ms | shrunk, ms | times as fast |\n|---|---|---|---|")
    rows = {"whole window, all logits": {name: timing["median"] for name, timing in cell["whole_windows"].items()}}
    for entry in cell["cells"]:
        title = f"{entry['phase']}, batch {entry['batch']}, {entry['tokens']} tokens"
        rows.setdefault(title, {})[entry["variant"]] = entry["median"]
    for title, seconds in rows.items():
        dense, small = seconds["dense"], seconds["shrunk"]
        print(f"| {title} | {1000 * dense:.1f} | {1000 * small:.1f} | {dense / small:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--matmul-precision", choices=["medium", "highest"], default="medium")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/deployment_smollm2_135m.json")
    options = parser.parse_args()
    torch.set_float32_matmul_precision(options.matmul_precision)
    windows = load_file(options.windows)
    path = options.model or smollm2_135m()
    setting = {
        "model": options.model or "SmolLM2-135M-Instruct",
        "windows": {name: list(tensor.shape) for name, tensor in windows.items()},
        "grid": repr(GRID),
        "matmul_precision": options.matmul_precision,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    results = open_results(options.results, setting)
    for name in options.only:
        if name not in results["cells"]:
            print(name)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            cell = CELLS[name](model, windows)
            if name != "speed":
                cell["perplexity"] = round(perplexity(model, windows["wikitext2"]), 3)
            results["cells"][name] = cell
            write_json(options.results, results)
    print_tables(results)


if __name__ == "__main__":
    main()
