"""What a record of measured times says: its setting, plain sentences, a table and a picture."""

import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.table import Table

from prune_callbacks.deploy.latency import BASE
from prune_callbacks.reporting.drawing import save, subplots

Cell = dict[str, Any]
Record = dict[str, Any]
"""`setting` (see there), `cells` (of `layer_sweep` and `model_sweep`), and maybe `left_out` (why, by variant) and `csr`
(the sizes of a `CSRReport`)."""

BASELINES = (BASE, f"{BASE} compiled")
SPEEDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100)
"""Where the axes of the picture have marks."""

COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#9d755d", "#72b7b2", "#ff9da6")


def setting(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where and in what something is measured."""
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
    What was measured, in plain sentences: where a variant is faster than dense and by how much at best, where it loses.

    Two times differ if neither median lies between the 10th and the 90th percentile of the other's repeats. Of a CPU
    the first sentence says that it was one.
    """
    where = record["setting"]
    if where["kind"] == "cpu":
        threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
        sentences = [
            f"Measured on a CPU ({where['device']}, {threads}, {where['dtype']}): this says nothing about GPUs."
        ]
    else:
        sentences = [f"Measured on {where['device']}, {where['dtype']}, torch {where['torch']}."]
    for name in _variants(record):
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


def _variants(record: Record) -> list[str]:
    return list(dict.fromkeys(cell["variant"] for cell in record["cells"]))


def _place(cell: Cell) -> tuple[Any, ...]:
    return cell["title"], cell["phase"], cell["batch"], cell["tokens"]


def _compared(name: str, baseline: str, cells: list[Cell], all_cells: list[Cell]) -> list[str]:
    others = {_place(c): c for c in all_cells if c["variant"] == baseline and not c["error"]}
    pairs = [(c, others[_place(c)]) for c in cells if not c["error"] and _place(c) in others]
    if name in (BASE, baseline) or not pairs:
        return []
    ratios = {_place(c): other["median"] / c["median"] for c, other in pairs}
    faster = [c for c, other in pairs if c["high"] < other["median"] and c["median"] < other["low"]]
    slower = [c for c, other in pairs if c["low"] > other["median"] and c["median"] > other["high"]]
    sentences = []
    if faster:
        best = max(faster, key=lambda c: ratios[_place(c)])
        sentences.append(
            f"{name} is faster than {baseline} in {len(faster)} of {len(pairs)} cells, at best "
            f"{ratios[_place(best)]:.2f}x ({describe(best)})."
        )
    if slower:
        spans = "; ".join(_spans(slower, [c for c, _ in pairs], ratios))
        sentences.append(f"{name} is slower than {baseline} in {len(slower)} of {len(pairs)} cells: {spans}.")
    alike = len(pairs) - len(faster) - len(slower)
    if alike:
        sentences.append(f"{name} and {baseline} cannot be told apart in {alike} of {len(pairs)} cells.")
    return sentences


def describe(cell: Cell) -> str:
    """Where a cell was measured, in words."""
    return f"{_group(cell)}, {_tokens(cell['tokens'])}"


def _group(cell: Cell) -> str:
    if cell["phase"] == "layer":
        return str(cell["title"])
    return ("" if cell["title"] == "model" else f"{cell['title']}, ") + f"{cell['phase']}, batch {cell['batch']}"


def _tokens(count: int, last: int | None = None) -> str:
    return f"{count} token{'s' if count > 1 else ''}" if last is None else f"{count} to {last} tokens"


def _spans(chosen: list[Cell], cells: list[Cell], ratios: dict[tuple[Any, ...], float]) -> Iterable[str]:
    """The chosen cells, neighbours in the number of tokens put together."""
    for group in dict.fromkeys(_group(cell) for cell in cells):
        run: list[Cell] = []
        ordered = sorted((c for c in cells if _group(c) == group), key=lambda c: c["tokens"])
        for cell in [*ordered, None]:
            if cell is not None and cell in chosen:
                run.append(cell)
            elif run:
                low, high = (f"{f(ratios[_place(c)] for c in run):.2f}x" for f in (min, max))
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
    """A row a cell, a column a variant: the median and the speed over dense; then the bytes."""
    where, names = record["setting"], _variants(record)
    table = Table(title=f"{where['device']}, {where['dtype']}: median time and speed over {BASE}")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for place in dict.fromkeys(_place(cell) for cell in record["cells"]):
        row = {cell["variant"]: cell for cell in record["cells"] if _place(cell) == place}
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


def draw_latency(record: Record, path: Path) -> None:
    """Draws the speed over dense against the number of tokens, one panel a layer shape, or a phase and batch."""
    groups = list(dict.fromkeys(_group(cell) for cell in record["cells"]))
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, axes = subplots(
        rows,
        columns,
        figsize=(4.6 * columns + 0.4, 3.2 * rows + 0.9),
        squeeze=False,
        sharey=True,  # a small gain is to look small
    )
    where = record["setting"]
    note = ": a CPU, which says nothing about GPUs" if where["kind"] == "cpu" else ""
    threads = f", {where['threads']} threads" if where["kind"] == "cpu" else ""
    figure.suptitle(
        f"speed over {BASE}, {where['dtype']}, medians, bands from the 10th to the 90th percentile\n"
        f"{where['device']}{threads}{note}",
        fontsize=11,
    )
    names = [name for name in _variants(record) if name != BASE]
    for axis, group in zip(axes.flat, groups, strict=False):
        _draw_group(axis, group, [cell for cell in record["cells"] if _group(cell) == group], names)
    ratios = _ratios(record["cells"])
    axes[0, 0].set_ylim(max(min(ratios) / 1.1, SPEEDS[0]), max(ratios) * 1.1)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def _ratios(cells: list[Cell]) -> list[float]:
    """All that is drawn, and some space around 1."""
    dense = {_place(cell): cell["median"] for cell in cells if cell["variant"] == BASE}
    known = [cell for cell in cells if cell["variant"] != BASE and cell["speedup"] is not None]
    return [0.8, 1.25, *(dense[_place(cell)] / cell[key] for cell in known for key in ("low", "high"))]


def _draw_group(axis: Axes, group: str, cells: list[Cell], names: Sequence[str]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    dense = {cell["tokens"]: cell["median"] for cell in cells if cell["variant"] == BASE}
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        found = [cell for cell in cells if cell["variant"] == name and cell["speedup"] is not None]
        if found:
            places, values = [cell["tokens"] for cell in found], [cell["speedup"] for cell in found]
            least, most = ([dense[c["tokens"]] / c[end] for c in found] for end in ("high", "low"))
            # Of two points nothing is known in between.
            line = "-" if len(found) > 2 else ":"
            axis.plot(places, values, marker="o", markersize=4, linestyle=line, color=colour, label=name)
            axis.fill_between(places, least, most, color=colour, alpha=0.2, linewidth=0)
    failed = [name for name in names if any(cell["variant"] == name and cell["error"] for cell in cells)]
    if failed:
        axis.text(0.03, 0.03, f"failed: {', '.join(failed)}", transform=axis.transAxes, fontsize=8, color="#a00000")
    counts = sorted({cell["tokens"] for cell in cells})
    axis.xaxis.set_major_locator(FixedLocator(counts[:: math.ceil(len(counts) / 8)]))
    axis.yaxis.set_major_locator(FixedLocator(SPEEDS))
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_locator(NullLocator())
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.axhspan(1e-3, 1, color="#888888", alpha=0.1, linewidth=0)
    axis.axhline(1, color="#555555", linewidth=1)
    axis.tick_params(labelleft=True)
    axis.set_title(group, fontsize=10)
    axis.set_xlabel(
        {"prefill": "tokens of the prompt", "decode": "tokens in the cache"}.get(cells[0]["phase"], "tokens")
    )
    axis.set_ylabel(f"speed over {BASE} (below 1: slower)", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
