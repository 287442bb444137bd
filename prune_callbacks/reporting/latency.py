"""Summarises a record of measured times: its setting, plain sentences and a table."""

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from prune_callbacks.deploy.latency import BASE

Cell = dict[str, Any]
Record = dict[str, Any]
"""The record of a measurement: `setting` (see that function), `cells` (records of `layer_sweep` and `model_sweep`), and
optionally `left_out` (reasons by variant) and `csr` (the sizes of a `CSRReport`)."""

BASELINES = (BASE, f"{BASE} compiled")


def setting(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the setting of a measurement: device, threads, dtype and version of torch."""
    return {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def verdict(record: Record) -> list[str]:
    """
    Describes a measurement in plain sentences: where each variant is faster than dense, by how much, and where slower.

    Two times differ if neither median lies between the 10th and the 90th percentile of the other's repeats. For a CPU,
    the first sentence says that the times do not apply to GPUs.
    """
    where = record["setting"]
    if where["kind"] == "cpu":
        threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
        sentences = [
            f"Measured on a CPU ({where['device']}, {threads}, {where['dtype']}): this says nothing about GPUs."
        ]
    else:
        sentences = [f"Measured on {where['device']}, {where['dtype']}, torch {where['torch']}."]
    for name in variants_of(record):
        cells = [cell for cell in record["cells"] if cell["variant"] == name]
        for baseline in BASELINES:
            sentences += _compared(name, baseline, cells, record["cells"])
        sentences += _failed(name, cells) + _weights(name, cells, record["cells"])
    if "csr" in record:
        csr = record["csr"]
        sentences.append(
            f"CSR takes fewer bytes than dense from {csr['break_even_sparsity']:.1%} zeros on; these weights have "
            f"{csr['sparsity']:.1%}, and take {csr['csr_bytes'] / csr['dense_bytes']:.2f} of dense's bytes."
        )
    return sentences + [f"{name} was left out: {why.rstrip('.')}." for name, why in record.get("left_out", {}).items()]


def variants_of(record: Record) -> list[str]:
    """Returns the variants of a record, in the order of measurement."""
    return list(dict.fromkeys(cell["variant"] for cell in record["cells"]))


def place_of(cell: Cell) -> tuple[Any, ...]:
    """Returns the key that the cells of different variants of one measurement share."""
    return cell["title"], cell["phase"], cell["batch"], cell["tokens"]


def _compared(name: str, baseline: str, cells: list[Cell], all_cells: list[Cell]) -> list[str]:
    others = {place_of(c): c for c in all_cells if c["variant"] == baseline and not c["error"]}
    pairs = [(c, others[place_of(c)]) for c in cells if not c["error"] and place_of(c) in others]
    if name in (BASE, baseline) or not pairs:
        return []
    ratios = {place_of(c): other["median"] / c["median"] for c, other in pairs}
    faster = [c for c, other in pairs if c["high"] < other["median"] and c["median"] < other["low"]]
    slower = [c for c, other in pairs if c["low"] > other["median"] and c["median"] > other["high"]]
    sentences = []
    if faster:
        best = max(faster, key=lambda c: ratios[place_of(c)])
        sentences.append(
            f"{name} is faster than {baseline} in {len(faster)} of {len(pairs)} cells, at best "
            f"{ratios[place_of(best)]:.2f}x ({describe(best)})."
        )
    if slower:
        spans = "; ".join(_spans(slower, [c for c, _ in pairs], ratios))
        sentences.append(f"{name} is slower than {baseline} in {len(slower)} of {len(pairs)} cells: {spans}.")
    alike = len(pairs) - len(faster) - len(slower)
    if alike:
        sentences.append(f"{name} and {baseline} cannot be told apart in {alike} of {len(pairs)} cells.")
    return sentences


def describe(cell: Cell) -> str:
    """Returns a description of the measurement of a cell, in words."""
    return f"{group_of(cell)}, {_tokens(cell['tokens'])}"


def group_of(cell: Cell) -> str:
    """Returns a description of the measurement of a cell, in words, without the number of tokens."""
    if cell["phase"] == "layer":
        return str(cell["title"])
    return ("" if cell["title"] == "model" else f"{cell['title']}, ") + f"{cell['phase']}, batch {cell['batch']}"


def _tokens(count: int, last: int | None = None) -> str:
    return f"{count} token{'s' if count > 1 else ''}" if last is None else f"{count} to {last} tokens"


def _spans(chosen: list[Cell], cells: list[Cell], ratios: dict[tuple[Any, ...], float]) -> Iterable[str]:
    """Yields descriptions of the chosen cells; cells with neighbouring numbers of tokens share one."""
    for group in dict.fromkeys(group_of(cell) for cell in cells):
        run: list[Cell] = []
        ordered = sorted((c for c in cells if group_of(c) == group), key=lambda c: c["tokens"])
        for cell in [*ordered, None]:
            if cell is not None and cell in chosen:
                run.append(cell)
            elif run:
                low, high = (f"{f(ratios[place_of(c)] for c in run):.2f}x" for f in (min, max))
                last = run[-1]["tokens"] if len(run) > 1 else None
                yield f"{group}, {_tokens(run[0]['tokens'], last)}: {low}" + (f" to {high}" if low != high else "")
                run = []


def _failed(name: str, cells: list[Cell]) -> list[str]:
    failed = [cell for cell in cells if cell["error"]]
    if not failed:
        return []
    return [
        f"{name} failed in {len(failed)} of {len(cells)} cells, first at {describe(failed[0])}: {failed[0]['error']}"
    ]


def _weights(name: str, cells: list[Cell], all_cells: list[Cell]) -> list[str]:
    models = {c["variant"]: c["weight_bytes"] for c in all_cells if c["phase"] != "layer"}
    if name == BASE or name not in models or name.endswith("compiled") or BASE not in models:
        return []
    mine, dense = models[name], models[BASE]
    return [f"With {name} the model's weights take {_bytes(mine)}, {mine / dense:.2f} of dense's."]


def latency_table(record: Record) -> Table:
    """Returns a table with a row per measurement and a column per variant: median, speed over dense, and bytes."""
    where, names = record["setting"], variants_of(record)
    table = Table(title=f"{where['device']}, {where['dtype']}: median time and speed over {BASE}")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for place in dict.fromkeys(place_of(cell) for cell in record["cells"]):
        row = {cell["variant"]: cell for cell in record["cells"] if place_of(cell) == place}
        table.add_row(describe(next(iter(row.values()))), *(_shown(row.get(name)) for name in names))
    table.add_section()
    for title in dict.fromkeys(cell["title"] for cell in record["cells"]):
        here = [cell for cell in record["cells"] if cell["title"] == title]
        stored = {cell["variant"]: cell["weight_bytes"] for cell in here}
        table.add_row(f"{title}, weights", *(_bytes(stored.get(name)) for name in names))
        peaks = {name: [c["peak_bytes"] for c in here if c["variant"] == name and c["peak_bytes"]] for name in names}
        if any(peaks.values()):
            table.add_row(f"{title}, peak beside them", *(_bytes(max(peaks[name], default=None)) for name in names))
    return table


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if cell["error"]:
        return "[red]failed[/]"
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("us", 1e6)) if cell["median"] * f >= 1 or u == "us")
    time = f"{cell['median'] * factor:.3g} {unit}"
    if cell["variant"] == BASE or cell["speedup"] is None:
        return time
    colour = "red" if cell["speedup"] < 1 else "green"
    return f"{time} [{colour}]{cell['speedup']:.2f}x[/]"


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.3g} MiB"
