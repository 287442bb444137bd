"""
What CSR weights are worth on a CPU: time and bytes against dense, over the sparsity, in turns in one run.

    python benchmarks/csr.py --threads 1

Layers of SmolLM2-135M's shapes (out x in) in float32 with zeros in random places. For every shape and number of tokens
the break-even sparsity for speed, by linear interpolation between the measured sparsities ("none": CSR is never faster;
the smallest one measured: it is faster there already), and for every shape the one for bytes, by arithmetic and as
counted. Writes benchmarks/results/csr_cpu.json.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from prune_callbacks.deploy.csr import break_even_sparsity, convert_to_csr_, csr_bytes
from prune_callbacks.deploy.latency import BASE, layer_sweep
from prune_callbacks.reporting.latency import setting
from prune_callbacks.writing import write_json

SHAPES = {"smollm2": {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)}}
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def pair(shape: tuple[int, int], sparsity: float) -> dict[str, nn.Module]:
    """The same layer, dense and CSR."""
    weight = torch.randn(shape)
    weight.view(-1)[torch.randperm(weight.numel())[: round(sparsity * weight.numel())]] = 0
    built: dict[str, nn.Module] = {}
    for name in (BASE, "CSR"):
        layer = nn.Linear(shape[1], shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        built[name] = layer
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"only": built["CSR"]})])
    convert_to_csr_(model)
    return built


def break_even(sparsities: Sequence[float], speeds: Sequence[float]) -> float | None:
    """The sparsity from which on the speed over dense stays above 1; the first if it always is, None if not at last."""
    place = len(speeds)
    while place and speeds[place - 1] > 1:
        place -= 1
    if place in (0, len(speeds)):
        return sparsities[0] if place == 0 else None
    share = (1 - speeds[place - 1]) / (speeds[place] - speeds[place - 1])
    return sparsities[place - 1] + share * (sparsities[place] - sparsities[place - 1])


def show(record: dict[str, Any]) -> None:
    where, least = record["setting"], record["sparsities"][0]
    table = Table(title=f"{where['device']}, threads: {where['threads']}: CSR's speed over dense's")
    for column in ("layer", "tokens", *(f"{s:.0%}" for s in record["sparsities"]), "break-even", "for bytes"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in record["rows"]:
        even = "none" if row["break_even"] is None else f"{row['break_even']:.1%}"
        even = f"{least:.0%} or less" if row["break_even"] == least else even
        speeds = (f"{speed:.2f}x" for speed in row["speeds"])
        table.add_row(row["layer"], str(row["tokens"]), *speeds, even, f"{row['bytes_break_even']:.1%}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 64))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/csr_cpu.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for kind, shape in SHAPES[options.shapes].items():
        pairs = {f"{sparsity}": pair(shape, sparsity) for sparsity in SPARSITIES}
        cells = [c for c in layer_sweep(pairs, options.tokens, repeats=options.repeats) if c["variant"] == "CSR"]
        stored = [csr_bytes(built["CSR"].weight) / built[BASE].weight.nbytes for built in pairs.values()]
        for tokens in options.tokens:
            here = [cell for cell in cells if cell["tokens"] == tokens]
            speeds = [cell["speedup"] for cell in here]
            rows.append(
                {
                    "layer": f"{kind} ({shape[0]} x {shape[1]})",
                    "tokens": tokens,
                    "speeds": speeds,
                    "break_even": break_even(SPARSITIES, speeds),
                    "bytes_over_dense": stored,
                    "bytes_break_even": break_even_sparsity([shape]),
                    "csr_seconds": [{key: cell[key] for key in ("median", "low", "high")} for cell in here],
                }
            )
    record = {
        "setting": setting(torch.device("cpu"), torch.float32),
        "sparsities": SPARSITIES,
        "repeats": options.repeats,
        "rows": rows,
        "versions": {"torch": version("torch"), "python": platform.python_version()},
        "command": " ".join(["benchmarks/csr.py", *sys.argv[1:]]),
    }
    write_json(options.output, record)
    show(record)


if __name__ == "__main__":
    main()
