"""Draws measured times: the speed over dense against the number of tokens."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from prune_callbacks.deploy.latency import BASE
from prune_callbacks.reporting.drawing import save, subplots
from prune_callbacks.reporting.latency import Cell, Record, group_of, place_of, variants_of

SPEEDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100)
"""Positions of the tick marks for speed."""

COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#9d755d", "#72b7b2", "#ff9da6")


def draw_latency(record: Record, path: Path) -> None:
    """Draws the speed over dense against the number of tokens, with a panel for each layer, or each phase and batch."""
    groups = list(dict.fromkeys(group_of(cell) for cell in record["cells"]))
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, axes = subplots(
        rows,
        columns,
        figsize=(4.6 * columns + 0.4, 3.2 * rows + 0.9),
        squeeze=False,
        sharey=True,  # so that a small gain looks small
    )
    where = record["setting"]
    note = ": a CPU, which says nothing about GPUs" if where["kind"] == "cpu" else ""
    threads = f", {where['threads']} threads" if where["kind"] == "cpu" else ""
    figure.suptitle(
        f"speed over {BASE}, {where['dtype']}, medians, bands from the 10th to the 90th percentile\n"
        f"{where['device']}{threads}{note}",
        fontsize=11,
    )
    names = [name for name in variants_of(record) if name != BASE]
    for axis, group in zip(axes.flat, groups, strict=False):
        _draw_group(axis, group, [cell for cell in record["cells"] if group_of(cell) == group], names)
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
    """Returns all speeds that are drawn, with 0.8 and 1.25 for some space around 1."""
    dense = {place_of(cell): cell["median"] for cell in cells if cell["variant"] == BASE}
    known = [cell for cell in cells if cell["variant"] != BASE and cell["speedup"] is not None]
    return [0.8, 1.25, *(dense[place_of(cell)] / cell[key] for cell in known for key in ("low", "high"))]


def _draw_group(axis: Axes, group: str, cells: list[Cell], names: Sequence[str]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    dense = {cell["tokens"]: cell["median"] for cell in cells if cell["variant"] == BASE}
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        found = [cell for cell in cells if cell["variant"] == name and cell["speedup"] is not None]
        if found:
            places, values = [cell["tokens"] for cell in found], [cell["speedup"] for cell in found]
            least, most = ([dense[c["tokens"]] / c[end] for c in found] for end in ("high", "low"))
            # Dotted for two points: nothing was measured between them.
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
