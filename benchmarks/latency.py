"""
What 2:4 layers are worth on a GPU: dense, dense compiled and every 2:4 form that it serves, in turns in one run.

    python benchmarks/latency.py                                    # Llama-7B's layers, 1 to 8192 tokens
    python benchmarks/latency.py --shapes llama7b --tokens 4096

Weights are random and 2:4, in bfloat16, (out x in). A form is left out, with the reason, where the device has no
kernels for it; one that fails for a number of tokens is recorded as failed there. Times are the device's, with weights
from memory. Writes benchmarks/results/latency_DEVICE.json and prints the table and the verdict; --picture draws.
CPUs: benchmarks/csr.py.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from prune_callbacks import NM
from prune_callbacks.deploy.backends import TENSORS, Backend
from prune_callbacks.deploy.conversion import Conversion
from prune_callbacks.deploy.latency import BASE, layer_sweep, with_compiled
from prune_callbacks.deploy.low_precision import convert_fp8_, convert_int8_
from prune_callbacks.deploy.semi_structured import compress
from prune_callbacks.reporting.latency import latency_table, setting, verdict
from prune_callbacks.reporting.latency_picture import draw_latency
from prune_callbacks.writing import write_json

SHAPES = {"llama7b": {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)}}
TOKENS = tuple(2**power for power in range(14))
QUANTIZED = {"2:4 int8": convert_int8_, "2:4 fp8": convert_fp8_}


def two_four(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """A dense layer with random weights, 2:4."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    return holding((weight * NM(2, 4).keep(weight.abs())).to(device, dtype))


def holding(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def packed(dense: nn.Linear, backend: Backend) -> nn.Module:
    return holding(compress(dense.weight, None, backend))


def quantized(dense: nn.Linear, convert: Callable[..., Conversion]) -> nn.Module:
    """The layer as a conversion of models makes it."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"only": holding(dense.weight.detach().clone())})])
    made = convert(model, progress=False)
    if not made.converted:
        raise ValueError(made.reason or "; ".join(made.skipped.values()))
    return model.layers[0]["only"]


def variants(dense: nn.Linear, left_out: dict[str, str]) -> dict[str, nn.Module]:
    builders: dict[str, Callable[[], nn.Module]] = {
        f"2:4 {backend}": lambda backend=backend: packed(dense, backend) for backend in TENSORS
    }
    builders |= {name: lambda convert=convert: quantized(dense, convert) for name, convert in QUANTIZED.items()}
    built: dict[str, nn.Module] = {BASE: dense}
    for name, build in builders.items():
        try:
            built[name] = build()
        except (ValueError, RuntimeError) as error:
            left_out[name] = f"{tuple(dense.weight.shape)}: {type(error).__name__}: {str(error).strip()[:300]}"
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(SHAPES), default="llama7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="nothing under torch.compile")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/latency_DEVICE.json")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device was found; for CPUs there is benchmarks/csr.py")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    left_out: dict[str, str] = {}
    layers = {}
    for kind, shape in SHAPES[options.shapes].items():
        built = variants(two_four(shape, device, dtype), left_out)
        layers[f"{kind} ({shape[0]} x {shape[1]})"] = built if options.eager else with_compiled(built)
    record = {
        "setting": setting(device, dtype),
        "shapes": options.shapes,
        "repeats": options.repeats,
        "left_out": left_out,
        "cells": layer_sweep(layers, options.tokens, repeats=options.repeats, warmup=5),
        "versions": {"torch": version("torch"), "cuda": torch.version.cuda, "python": platform.python_version()},
        "command": " ".join(["benchmarks/latency.py", *sys.argv[1:]]),
    }
    record["verdict"] = verdict(record)
    name = record["setting"]["device"].replace(" ", "_").lower()
    write_json(options.output or Path(__file__).parent / f"results/latency_{name}.json", record)
    if options.picture:
        draw_latency(record, options.picture)
    console = Console(width=160)
    console.print(latency_table(record))
    for sentence in record["verdict"]:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
