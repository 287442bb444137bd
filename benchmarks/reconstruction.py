"""
Perplexity and minutes of block reconstruction, from several starts, beside the start alone.

    python benchmarks/reconstruction.py WINDOWS.safetensors [--held-out TEXT.jsonl] [--starts "ALPS 2:4" ...]

WINDOWS is a safetensors file of integer token windows: `calibration` and `wikitext2`, both (windows, tokens). TEXT has
one document per line, under "text"; windows of documents that no calibration window comes from are a second text to
judge on, which like `wikitext2` decides nothing. Every start is pruned alone, then pruned again with reconstruction, so
that later blocks are calibrated on reconstructed ones. Results are written after every cell; run again, and what is
finished is not measured twice. `--save FOLDER` keeps the pruned models, and the windows that the dense model writes.
"""

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_callbacks import (
    ALPS,
    NM,
    BlockReconstruction,
    MaskSet,
    MeasuredAllocation,
    SparseGPT,
    Unstructured,
    Wanda,
    permute_channels_,
    prune_sequentially,
    write_windows,
)
from prune_callbacks.extend import Allocation
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.pruners import Pruner
from prune_callbacks.storage.cells import open_results
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import smollm2_135m
from prune_callbacks.writing import write_json

PERMUTED = "ALPS 2:4, permuted"
STARTS: dict[str, tuple[Pruner, Allocation | None]] = {
    "ALPS 2:4": (ALPS(NM(2, 4)), None),
    PERMUTED: (ALPS(NM(2, 4)), None),
    "ALPS 50 %": (ALPS(Unstructured(0.5)), None),
    "ALPS 60 %": (ALPS(Unstructured(0.6)), None),
    "ALPS 70 %": (ALPS(Unstructured(0.7)), None),
    "ALPS 50 %, allocated": (ALPS(Unstructured(0.5)), MeasuredAllocation()),
    "ALPS 60 %, allocated": (ALPS(Unstructured(0.6)), MeasuredAllocation()),
    "ALPS 70 %, allocated": (ALPS(Unstructured(0.7)), MeasuredAllocation()),
    "SparseGPT 2:4": (SparseGPT(NM(2, 4)), None),
    "Wanda 2:4": (Wanda(NM(2, 4)), None),
}


class Setting(NamedTuple):
    """How a start is treated: the reconstruction, and how many windows the dense model writes to calibrate on too."""

    reconstruction: BlockReconstruction | None
    written: int = 0


SETTINGS: dict[str, Setting] = {
    "alone": Setting(None),
    "alone, 32 written": Setting(None, 32),
    "quick": Setting(BlockReconstruction(passes=2), 24),
    "reconstruction": Setting(BlockReconstruction()),
    "reconstruction, 32 written": Setting(BlockReconstruction(), 32),
    "reconstruction in 3 passes, 96 written": Setting(BlockReconstruction(passes=3), 96),
}


def held_out(path: Path, model: str, calibration: Tensor, count: int = 24) -> Tensor:
    """Returns the first windows of the last long documents that no calibration window was cut from."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    marks = [tokenizer.decode(row[len(row) // 4 :][:24]).strip() for row in calibration]
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    windows: list[list[int]] = []
    for text in reversed(texts):
        ids = tokenizer(text)["input_ids"][: calibration.shape[1]]
        if len(ids) == calibration.shape[1] and not any(mark in text for mark in marks):
            windows.append(ids)
        if len(windows) == count:
            break
    return torch.tensor(windows)


def read_windows(model: str | None, windows: Path, further: Path | None) -> tuple[str, Tensor, dict[str, Tensor]]:
    """Returns the model's folder, the calibration windows, and the texts to judge on, by name."""
    path, given = model or smollm2_135m(), load_file(windows)
    calibration, texts = given["calibration"].long(), {"wikitext2": given["wikitext2"].long()}
    if further is not None:
        texts["held_out"] = held_out(further, path, calibration)
    return path, calibration, texts


def folder_name(key: str) -> str:
    """Returns the name of the folder that `--save` writes a cell's model into."""
    return key.replace(" ", "_").replace("%", "percent")


def measure(model: torch.nn.Module, texts: dict[str, Tensor]) -> dict[str, float]:
    """Returns the perplexity on every text."""
    return {name: round(perplexity(model, windows, progress=False), 3) for name, windows in texts.items()}


def written(model: str, calibration: Tensor, count: int, folder: Path | None) -> tuple[Tensor, float]:
    """Returns windows that the dense model writes, and the seconds that it took; from the folder if they are there."""
    mark = hashlib.sha256(f"{model} {torch.get_float32_matmul_precision()} {calibration.tolist()}".encode()).hexdigest()
    path = None if folder is None else folder / f"written_{count}_{mark[:8]}.safetensors"
    if path is None or not path.exists():
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        begin = time.perf_counter()
        windows = write_windows(network, calibration.split(4), count)
        seconds = time.perf_counter() - begin
        if path is None:
            return windows, seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"windows": windows, "seconds": torch.tensor(seconds)}, path)
    kept = load_file(path)
    return kept["windows"], float(kept["seconds"])


def run(
    model: str, start: str, setting: Setting, calibration: Tensor, texts: dict[str, Tensor], folder: Path | None
) -> tuple[dict[str, Any], torch.nn.Module, MaskSet]:
    """Prunes the model, with or without reconstruction; returns the cell, the model and its masks."""
    windows, writing = calibration, 0.0
    if setting.written:
        further, writing = written(model, calibration, setting.written, folder)
        windows = torch.cat([calibration, further])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    begin = time.perf_counter()
    pruner, allocation = STARTS[start]
    if start == PERMUTED:
        permute_channels_(network, windows.split(4), pruner.pattern)
    report = prune_sequentially(
        network, windows.split(4), pruner, allocation=allocation, reconstruction=setting.reconstruction
    )
    seconds = time.perf_counter() - begin
    assert report.masks.violations(network.named_parameters()) == {}
    blocks = report.reconstruction
    cell: dict[str, Any] = {"setting": repr(setting.reconstruction), "written": setting.written}
    cell |= measure(network, texts)
    cell["seconds"] = {
        "all": round(writing + seconds, 1),
        "writing": round(writing, 1),
        "allocation": round(report.allocation_seconds, 1),
        "reconstruction": round(sum(block.seconds for block in blocks), 1),
    }
    cell["put_back"] = [block.name for block in blocks if block.put_back]
    cell["blocks"] = [[round(block.before, 5), round(block.after, 5), block.best_pass] for block in blocks]
    return cell, network, report.masks


def table(cells: dict[str, Any], texts: list[str]) -> None:
    """Prints the cells as a table."""
    print(f"\n| | {' | '.join(texts)} | seconds | of these writing | allocation | reconstruction |")
    print(f"|---|{'---|' * (len(texts) + 4)}")
    for name, cell in cells.items():
        seconds = {"all": 0, "writing": 0, "allocation": 0, "reconstruction": 0} | cell.get("seconds", {})
        values = " | ".join(f"{cell[text]:.2f}" for text in texts)
        costs = " | ".join(f"{value:.0f}" for value in seconds.values())
        print(f"| {name} | {values} | {costs} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--model", help="a causal LM; SmolLM2-135M from its PyPI package by default")
    parser.add_argument("--held-out", type=Path, help="a .jsonl file of documents")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS), metavar="START")
    parser.add_argument("--settings", nargs="+", default=["alone", "reconstruction"], choices=list(SETTINGS))
    parser.add_argument("--save", type=Path, help="a folder to write the pruned models into")
    parser.add_argument("--matmul-precision", default="medium", choices=("highest", "high", "medium"))
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results/reconstruction_smollm2_135m.json"
    )
    args = parser.parse_args()
    path, calibration, texts = read_windows(args.model, args.windows, args.held_out)
    setting: dict[str, Any] = {
        "model": Path(path).name,
        "calibration": list(calibration.shape),
        "texts": {name: list(text.shape) for name, text in texts.items()},
        "matmul_precision": args.matmul_precision,
        "seed": 0,
    }
    results = open_results(args.results, setting)
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    torch.set_float32_matmul_precision(args.matmul_precision)
    if "dense" not in results["cells"]:
        results["cells"]["dense"] = measure(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), texts)
    for start in args.starts:
        for name in args.settings:
            key = f"{start}, {name}"
            if key not in results["cells"]:
                cell, network, masks = run(path, start, SETTINGS[name], calibration, texts, args.save)
                results["cells"][key] = cell
                print(key, {k: v for k, v in cell.items() if k != "blocks"}, flush=True)
                write_json(args.results, results)
                if args.save is not None:
                    save_sparse_model(network, masks, args.save / folder_name(key))
    write_json(args.results, results)
    table(results["cells"], list(texts))


if __name__ == "__main__":
    main()
