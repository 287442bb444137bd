"""Shows the points of a sweep as a table and a picture."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, PercentFormatter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prune_callbacks.reporting.drawing import plain_text, save, subplots

PANELS = (("perplexity", "perplexity"), ("seconds", "seconds to prune"), ("peak_memory_bytes", "peak memory, GiB"))


def curves(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the measured points of every curve, from left to right; each calibration setting has its own curve."""
    measured = [cell for cell in results["cells"].values() if "error" not in cell]
    along = {"calibration windows": "calibration_windows", "calibration text": "calibration"}
    told = [
        key for key in ("calibration", "calibration_windows", "seed") if key != along.get(results["setting"]["along"])
    ]
    told = [key for key in told if len({cell[key] for cell in measured}) > 1]
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in measured:
        name = ", ".join([cell["series"], *(f"{key.replace('_', ' ')} {cell[key]}" for key in told)])
        found.setdefault(name, []).append(cell)
    return {name: sorted(points, key=lambda point: _place(point["at"])) for name, points in found.items()}


def _place(at: int | float | str | None) -> tuple[bool, float, str]:
    """Returns a sort key: numbers in order, then None (which stands for "all"), then names in alphabetical order."""
    return (False, float(at), "") if isinstance(at, int | float) else (True, 0.0, "" if at is None else at)


@plain_text
def draw_curves(results: dict[str, Any], path: Path) -> None:
    """
    Draws perplexity, pruning time in seconds and peak memory in GiB of every point.

    Args:
        results: content of a sweep's file: `setting`, `dense`, and the points as `cells`.
        path: the picture.
    """
    setting, found = results["setting"], curves(results)
    figure, axes = subplots(1, 3, figsize=(15, 5), width_ratios=(2, 1, 1))
    figure.suptitle(
        f"{setting['model'] or 'model'} on {setting['evaluation']}, windows of {setting['seq_len']} tokens "
        f"(dense perplexity {results['dense']:.2f})"
    )
    values = [point["at"] for points in found.values() for point in points]
    numbers = all(isinstance(value, int | float) for value in values)
    places = {value: number for number, value in enumerate(sorted(set(values), key=_place))}
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for name, points in found.items():
            x = [point["at"] if numbers else places[point["at"]] for point in points]
            y = [float("nan") if point[key] is None else point[key] for point in points]
            axis.plot(x, [value / 2**30 for value in y] if key == "peak_memory_bytes" else y, marker="o", label=name)
        _label(axis, setting["along"], label, values if numbers else places)
    axes[0].axhline(results["dense"], color="#888888", linestyle=":", label="dense")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}" if _narrow(axes[0]) else NullFormatter())
    for axis in axes[1:]:
        axis.margins(y=0.1)
        axis.set_ylim(0)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def _narrow(axis: Axes) -> bool:
    """Returns whether an axis spans less than a factor of 20, so that it may show no power of ten."""
    low, high = axis.get_ylim()
    return bool(high < 20 * low)


def _label(axis: Axes, along: str, label: str, places: Any) -> None:
    axis.set_xlabel(along)
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    if isinstance(places, dict):
        axis.set_xticks(list(places.values()), ["all" if name is None else str(name) for name in places])
        if any(isinstance(name, str) for name in places):
            axis.tick_params(axis="x", rotation=20)
    elif along == "sparsity":
        axis.xaxis.set_major_formatter(PercentFormatter(1))
    elif min(places) > 0 and max(places) >= 20 * min(places):
        axis.set_xscale("log")
        axis.set_xticks(sorted(set(places)), [f"{value:g}" for value in sorted(set(places))])
        axis.xaxis.set_minor_formatter(NullFormatter())


def sweep_table(path: Path) -> None:
    """Prints all points of a sweep's file, if the file exists."""
    if not path.is_file():
        return
    results = json.loads(path.read_text())
    setting = results["setting"]
    dense = f"; dense {results['dense']:.2f}" if "dense" in results else ""
    title = f"perplexity on {setting['evaluation']} (windows of {setting['seq_len']}{dense})"
    table = Table(title=f"{escape(setting['model'] or 'model')}: {escape(title)}")
    for column in ("curve", setting["along"], "zeros", "perplexity", "seconds", "peak memory"):
        table.add_column(column, justify="left" if column == "curve" else "right")
    for name, points in curves(results).items():
        for point in points:
            value = "not finite" if point["perplexity"] is None else f"{point['perplexity']:.2f}"
            memory = f"{point['peak_memory_bytes'] / 2**30:.2f} GiB"
            at = "all" if point["at"] is None else str(point["at"])
            table.add_row(
                escape(name), escape(at), f"{point['sparsity']:.2%}", value, f"{point['seconds']:.1f}", memory
            )
        table.add_section()
    Console().print(table)
    for key, cell in results["cells"].items():
        if "error" in cell:
            Console().print(f"failed: {key}: {cell['error']}", markup=False)
    Console().print(f"{path} and {path.with_suffix('.png').name} have them", markup=False)
