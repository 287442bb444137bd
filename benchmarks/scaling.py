"""
What pruning models that do not fit here would cost: the tables of docs/scaling.md.

    python benchmarks/scaling.py [--rate TFLOPS] [--launches MICROSECONDS]

The arithmetic of every step is counted from shapes; how well the counts explain what was measured is fitted and
printed (benchmarks/results/solvers.json: real and synthetic layers on two CPU cores). Times on other devices are the
counts over an assumed rate of float32 products, with an assumed cost of every column that a sweep passes; neither is
measured here.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results/solvers.json"
WINDOWS, TOKENS = 128, 128 * 2048
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Llama's decoder block, and how many there are."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    key_value: int

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(rows, inputs) of the layers that share an input and are solved for together."""
        h, f = self.hidden, self.intermediate
        return [(h + 2 * self.key_value, h), (h, h), (2 * f, h), (h, f)]

    @property
    def weights(self) -> int:
        return sum(out * size for out, size in self.groups)


SHAPES = [
    Shape("Llama-2-7B", 32, 4096, 11008, 4096),
    Shape("Llama-2-70B", 80, 8192, 28672, 1024),
    Shape("Llama-3.1-405B", 126, 16384, 53248, 1024),
]


def solver_flops(method: str, out: int, size: int) -> float:
    """
    Floating-point operations of solving one group.

    A factorisation, the inverse from it and the inverse's factorisation are 4/3 in^3; a sweep is out in^2; a product
    of all rows with H, of which conjugate gradients take one a step, is 2 out in^2. MRP takes 8 products with `S = all`
    and about 3 a block of 128 columns beside them; ALPS about 30 and two more inverses.
    """
    factorisation, product = 4 / 3 * size**3, 2.0 * out * size**2
    return {
        "Wanda": 0.0,
        "SparseGPT": factorisation + product / 2,
        "MRP, S = all": factorisation + 8 * product,
        "MRP": factorisation + (8 + 3 * size / 128) * product,
        "ALPS": 3 * factorisation + 30 * product,
    }[method]


def report_flops(method: str, out: int, size: int) -> float:
    """The dense output's norm, for the relative loss in the report: a product with G."""
    return 0.0 if method == "Wanda" else 2.0 * out * size**2


def calibration_flops(shape: Shape, method: str) -> float:
    """
    Two passes of all windows through a block, and the Grams (Wanda: norms, which cost nothing beside).

    The first pass ends where `down_proj` is reached; of a Gram the upper half is computed, in 8 strips.
    """
    passes = 2.0 * TOKENS * (2 * shape.weights - shape.hidden * shape.intermediate)
    grams = (1 + 1 / 8) / 2 * sum(2.0 * TOKENS * size**2 for _, size in shape.groups)
    return passes + (0 if method == "Wanda" else grams)


def block_seconds(shape: Shape, method: str, devices: int, rate: float, launch: float) -> float:
    """Windows are split evenly; groups go to devices, the largest first, to whoever has least to do."""
    loads = [0.0] * devices
    costs = [
        (solver_flops(method, out, size) + report_flops(method, out, size)) / rate
        + launch * size * (method == "SparseGPT")
        for out, size in shape.groups
    ]
    for cost in sorted(costs, reverse=True):
        loads[loads.index(min(loads))] += cost
    return calibration_flops(shape, method) / rate / devices + max(loads)


def memory(shape: Shape, method: str) -> dict[str, float]:
    """
    Bytes on the device while a block is pruned, with a checkpoint in 16 bits and the windows' hidden states elsewhere.

    All Grams of a block in float32, and what the group in work takes.
    """
    grams = 0 if method == "Wanda" else 4 * sum(size**2 for _, size in shape.groups)
    work = max(workspace(method, out, size) for out, size in shape.groups)
    return {"two blocks": 2 * 2 * shape.weights, "Grams": grams, "solver": work}


def workspace(method: str, out: int, size: int) -> float:
    """
    Bytes that solving a group takes beside its weights and its Gram, all in float32.

    A factorisation holds three matrices of the Gram's size; SparseGPT's sweep, after it, one and some arrays of the
    weights' size. MRP has three and 6 arrays, and 6 more for the 2^27 weights that it solves for at once; ALPS twice
    as many. `tests/test_benchmarks.py` measures it.
    """
    matrix, array = 4 * size**2, 4 * out * size
    return {
        "Wanda": 2.0 * array,
        "SparseGPT": max(3 * matrix + array, matrix + 5.5 * array),
        "ALPS": 6 * matrix + 13 * array,
    }.get(method, 3 * matrix + 6 * array + 6 * min(4 * 2**27, array))


def fitted(cells: dict[str, Any], method: str) -> tuple[float, float]:
    """GFLOP/s that explain the measured seconds of all layers best, and the largest ratio of either to the other."""
    sizes = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
    sizes |= {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}
    sizes |= {"synthetic 2048 x 2048": (2048, 2048), "synthetic 4096 x 1024": (1024, 4096)}
    name = {"MRP, S = all": "MRP-SM (all)", "MRP": "MRP-SM (128)"}.get(method, method)
    points = []
    for key, cell in cells.items():
        layer, pattern = key.rsplit(", ", 1)
        if pattern == "50 %" and name in cell:
            out, size = sizes[layer if layer.startswith("synthetic") else layer.rsplit(".", 1)[-1]]
            points.append((solver_flops(method, out, size), cell[name]["seconds"]))
    flops, seconds = np.array(points).T
    rate = float(np.exp(np.mean(np.log(flops / seconds))))
    ratio = seconds / (flops / rate)
    return rate / 1e9, float(np.max(np.maximum(ratio, 1 / ratio)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=40.0, help="TFLOP/s of float32 products that one device sustains")
    parser.add_argument("--launches", type=float, default=100.0, help="microseconds that a column of a sweep takes")
    args = parser.parse_args()
    cells = json.loads(RESULTS.read_text())["cells"]
    rate, launch = args.rate * 1e12, args.launches / 1e6
    print("| method | GFLOP/s that fit the measured layers | worst ratio of count and measurement |\n|---|---|---|")
    for method in ("SparseGPT", "MRP, S = all", "MRP", "ALPS"):
        print(f"| {method} | {fitted(cells, method)[0]:.0f} | {fitted(cells, method)[1]:.1f} |")
    for shape in SHAPES:
        weights = shape.weights * shape.blocks / 1e9
        print(f"\n### {shape.name}: {shape.blocks} blocks, {weights:.1f} billion weights in them\n")
        print("| method | 1 device | 2 | 4 | device memory, GiB (two blocks + Grams + solver) |\n|---|---|---|---|---|")
        for method in ("Wanda", "SparseGPT", "MRP, S = all", "MRP", "ALPS"):
            hours = [f"{block_seconds(shape, method, n, rate, launch) * shape.blocks / 3600:.2f} h" for n in (1, 2, 4)]
            parts = memory(shape, method)
            detail = " + ".join(f"{value / GIB:.1f}" for value in parts.values())
            print(f"| {method} | {' | '.join(hours)} | {sum(parts.values()) / GIB:.1f} ({detail}) |")
        states = WINDOWS * 2048 * shape.hidden * 2 / GIB
        print(f"\nHidden states of {WINDOWS} x 2048 tokens in 16 bits: {states:.1f} GiB, in memory or on disk.")


if __name__ == "__main__":
    main()
