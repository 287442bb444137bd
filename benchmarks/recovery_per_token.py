"""
What a number of training tokens brings back, from several starts, and the minutes of all stages together.

    python benchmarks/recovery_per_token.py TEXT WINDOWS.safetensors --starts FOLDER ... [--tokens 8192 ...]

The starts are folders that `benchmarks/reconstruction.py --save MODELS` wrote; its results say how long they took to
make. TEXT and WINDOWS are as in `benchmarks/recovery.py`. Every start sees the same tokens, each once, with the first
of two learning rates that is better on held-out text for the least number of tokens. Writes a table and a picture.
Results are written after every run; start again, and what is finished is not measured twice.
"""

import argparse
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from reconstruction import folder_name
from recovery import METHODS, measure, train
from safetensors.torch import load_file
from tables import best_of, recovered
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_callbacks import TokenDataModule
from prune_callbacks.reporting.drawing import save, subplots
from prune_callbacks.storage.cells import open_results
from prune_callbacks.tasks import smollm2_135m
from prune_callbacks.writing import write_json

LENGTH = 512
HERE = Path(__file__).parent


def windows_of(text: Path, tokenizer: Any, count: int) -> TokenDataModule:
    """Returns the first `count` training windows of a text, with the same held-out windows for every count."""
    data = TokenDataModule.from_text_file(
        tokenizer,
        str(text),
        seq_len=LENGTH,
        batch_size=1,
        train_windows=count,
        calibration_windows=1,
        evaluation_windows=16,
    )
    data.setup("fit")
    return data


def draw(results: dict[str, Any], starts: list[str], tokens: list[int], path: Path) -> None:
    """Draws perplexity over the minutes of all stages, one line per start, the dense model as a line."""
    cells = results["cells"]
    figure, axis = subplots(figsize=(8, 4.6))
    for start in starts:
        base = cells[start]
        points = [(base["minutes"], base["reported"])]
        for count in tokens:
            cell = best_of(cells, start, count)
            points += [] if cell is None else [(base["minutes"] + cell["seconds"] / 60, cell["reported"])]
        axis.plot(*zip(*points, strict=True), marker="o", label=start)
    axis.axhline(cells["dense"]["reported"], color="black", linestyle="--", linewidth=1, label="dense")
    axis.set_xlabel("minutes, from the dense model on: pruning, reconstruction, training")
    axis.set_ylabel(f"perplexity, {results['setting']['evaluation']}, windows of {LENGTH} tokens")
    axis.set_title(f"{results['setting']['model']}: the first point of a line is untrained", fontsize=10)
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--starts", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--model", help="the dense model; SmolLM2-135M from its PyPI package by default")
    parser.add_argument("--evaluation", default="wikitext2", help="name of the tensor to report on")
    parser.add_argument("--method", default="masked LoRA, text and logits", choices=list(METHODS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--made", type=Path, default=HERE / "results/reconstruction_smollm2_135m.json")
    parser.add_argument("--results", type=Path, default=HERE / "results/recovery_per_token_smollm2_135m.json")
    parser.add_argument("--picture", type=Path, help="a .png file; the default lies beside the results")
    parser.add_argument("--matmul-precision", default="medium", choices=("highest", "high", "medium"))
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.matmul_precision)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    dense, made = args.model or smollm2_135m(), json.loads(args.made.read_text())["cells"]
    names = {folder_name(key): key for key in made}
    unknown = [folder.name for folder in args.starts if folder.name not in names]
    if unknown:
        parser.error(f"{args.made} does not say how {unknown} were made")
    reported = load_file(args.windows)[args.evaluation]
    setting = {"model": Path(dense).name, "text": args.text.name, "windows": list(reported.shape), "seed": 0}
    kept = ("method", "rank", "evaluation", "matmul_precision")
    results = open_results(args.results, setting | {name: getattr(args, name) for name in kept})
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    cells, tokenizer = results["cells"], AutoTokenizer.from_pretrained(dense)
    parts = {count: windows_of(args.text, tokenizer, count // LENGTH) for count in args.tokens}
    first = parts[min(parts)]

    def measured(path: str | Path) -> dict[str, float]:
        return measure(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), first, reported)

    if "dense" not in cells:
        cells["dense"] = measured(dense)
    rates = dict.fromkeys(args.starts, METHODS[args.method][2][-2:])
    for count in sorted(parts):
        for folder in args.starts:
            start = names[folder.name]
            if start not in cells:
                cells[start] = measured(folder / "model") | {"minutes": made[start]["seconds"]["all"] / 60}
            for rate in rates[folder]:
                key = f"{start}, {count} tokens, lr {rate:g}"
                if key not in cells:
                    warmup = count // LENGTH // 16
                    model, took = train(folder, dense, parts[count], args.method, rate, args.rank, warmup)
                    cells[key] = {"start": start, "tokens": count, "lr": rate, "seconds": round(took, 1)}
                    cells[key] |= measure(model, parts[count], reported)
                    print(key, cells[key], flush=True)
                    write_json(args.results, results)
            best = best_of(cells, start, count)
            assert best is not None
            rates[folder] = [best["lr"]]
    starts = [names[folder.name] for folder in args.starts]
    write_json(args.results, results)
    print(f"\n{recovered(cells)}")
    draw(results, starts, sorted(parts), args.picture or args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
