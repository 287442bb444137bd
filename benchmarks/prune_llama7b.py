r"""
How long it takes to prune a model of Llama-2-7B's shape, and how much memory, by method.

    python benchmarks/prune_llama7b.py [--device cuda] [--methods Wanda SparseGPT MRP ALPS]
    python benchmarks/prune_llama7b.py --layers 2 --hidden-size 8192 --intermediate-size 28672 --key-value-heads 8 \
        --batch-size 2 --methods SparseGPT MRP --results benchmarks/results/llama70b_blocks.json

The second prunes two blocks of Llama-2-70B's shape, from which the seconds of a block and the memory of all follow.

The weights are random, the calibration tokens too (128 windows of 2048): time and memory depend on the shapes and,
for MRP and ALPS, on how well conditioned the Grams are, so losses and perplexities say nothing here. For each method a
fresh model is pruned at 50 % and 2:4. Results are written after every cell; run again, and finished cells are kept.
"""

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from prune_callbacks import ALPS, MRP, NM, SparseGPT, Unstructured, Wanda, prune_sequentially
from prune_callbacks.storage.cells import open_results
from prune_callbacks.writing import write_json

PATTERNS = {"50 %": Unstructured(0.5), "2:4": NM(2, 4)}
METHODS: dict[str, Any] = {
    "Wanda": Wanda,
    "SparseGPT": SparseGPT,
    "MRP": lambda pattern: MRP(pattern, block_size=None),
    "ALPS": ALPS,
}


def model_of(arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden_size // 128),
        num_key_value_heads=arguments.key_value_heads,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype=arguments.dtype,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        return LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()


def measure(arguments: argparse.Namespace, method: str, pattern: str) -> dict[str, Any]:
    model = model_of(arguments)
    tokens = torch.randint(0, 32000, (arguments.windows, arguments.length), generator=torch.Generator().manual_seed(0))
    report = prune_sequentially(model, tokens.split(arguments.batch_size), METHODS[method](PATTERNS[pattern]))
    report.masks.check(PATTERNS[pattern])
    return {
        "prune_seconds": round(report.seconds, 1),
        "solver_seconds": round(sum(layer.seconds for layer in report.layers), 1),
        "peak_memory_bytes": report.peak_memory_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=11008)
    parser.add_argument("--key-value-heads", type=int, help="all of them by default")
    parser.add_argument("--results", type=Path, default=Path("prune_llama7b.json"))
    arguments = parser.parse_args()
    cuda = torch.device(arguments.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --device cpu works, with small --layers, --hidden-size and --windows")
    setting = {k: v for k, v in vars(arguments).items() if k not in ("methods", "results")}
    setting |= {
        "machine": torch.cuda.get_device_name(arguments.device) if cuda else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    results = open_results(arguments.results, setting)
    results["command"] = " ".join(["python", "benchmarks/prune_llama7b.py", *sys.argv[1:]])
    for method in arguments.methods:
        for pattern in PATTERNS:
            key = f"{method}, {pattern}"
            if key not in results["cells"]:
                results["cells"][key] = measure(arguments, method, pattern)
                write_json(arguments.results, results)
            print(key, results["cells"][key], flush=True)


if __name__ == "__main__":
    main()
