"""Draws the parts of pictures of a run: curves, bars, heat maps over blocks and layer kinds, corners of masks."""

import base64
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ContextDecorator
from itertools import takewhile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from numpy import ndarray

from prune_callbacks.storage.run_record import STAGES, Perplexities

COLOURS = {"dense": "#4c78a8", "pruned": "#e45756", "recovered": "#54a24b"}
CORNER = (64, 128)
"""Number of rows and columns of a mask that are shown."""

Curve = Sequence[Sequence[int | float | None]]

plain_text: ContextDecorator = matplotlib.rc_context({"text.parse_math": False})
"""Decorator for functions that draw names of models and layers: keeps dollar signs from starting formulas."""


def subplots(*shape: int, figsize: tuple[float | int, float | int], **settings: Any) -> tuple[Figure, Any]:
    """
    Returns a figure and its axes, as `pyplot.subplots` would, but outside of pyplot.

    Pyplot sets a backend for the whole process, including a notebook, and keeps every figure until it is closed.
    """
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **settings)


def save(figure: Figure, file: Path | io.BytesIO, dpi: int = 110) -> None:
    """
    Writes a figure of `subplots`, in the format given by the suffix of the file name, or as a PNG to a buffer.

    Equivalent to `figure.savefig`, which draws everything twice when it computes a layout.
    """
    figure.dpi = dpi
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)
    figure.set_layout_engine("none")
    figure.savefig(file, dpi=dpi)


def embedded(figure: Figure) -> str:
    """Returns the figure as a PNG in a `data:` URI."""
    file = io.BytesIO()
    save(figure, file, dpi=130)
    return _uri(file.getvalue())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def draw_perplexity(axis: Axes, measured: Perplexities) -> None:
    """Draws a bar for the perplexity of every measured stage."""
    values = {stage: value for stage in STAGES if (value := measured.at(stage)) is not None}
    bars = axis.bar(list(values), list(values.values()), color=[COLOURS[stage] for stage in values])
    axis.bar_label(bars, fmt="%.1f")
    axis.margins(y=0.15)
    title_perplexity(axis, measured)


def draw_rounds(axis: Axes, rounds: list[dict[str, Any]], label: str, metric: str | None = None) -> None:
    """Draws perplexity, or a metric, over sparsity at the end of every round."""
    values = [entry["perplexity"] if metric is None else entry.get("metrics", {}).get(metric) for entry in rounds]
    points = [(entry["sparsity"], value) for entry, value in zip(rounds, values, strict=True) if value is not None]
    if points:
        # Dotted for two points: nothing was measured between them.
        axis.plot(*zip(*points, strict=True), marker="o", label=label, linestyle="-" if len(points) > 2 else ":")
        last = f"{points[-1][1]:.2f}" if metric is None else f"{points[-1][1]:.4g}"
        axis.annotate(last, points[-1], textcoords="offset points", xytext=(6, 0), va="center")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlabel("zeros in pruned layers")
    axis.set_ylabel(metric or "perplexity")
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def title_perplexity(axis: Axes, measured: Perplexities) -> None:
    """Titles an axis with the text of the perplexity and the context length."""
    dataset = textwrap.fill(measured.dataset or "evaluation text", 30)
    axis.set_title(f"perplexity\n{dataset}\nwindows of {measured.seq_len} tokens", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def draw_training(axis: Axes, curve: Curve, changes: Sequence[int]) -> None:
    """Draws the training loss, with dotted lines at changes of the masks."""
    axis.set_title("training loss with masks held" + (" (dotted: masks change)" if changes else ""))
    axis.set_xlabel("optimizer step")
    for step in changes:
        axis.axvline(step, color="#bbbbbb", linestyle=":", linewidth=1)
    if curve:
        draw_curve(axis, curve, color="#4c78a8")
    else:
        axis.text(0.5, 0.5, "not trained yet", ha="center", va="center", transform=axis.transAxes)
    axis.spines[["top", "right"]].set_visible(False)


def draw_curve(axis: Axes, curve: Curve, **style: Any) -> None:
    """Draws losses over steps, with gaps where the loss was not finite."""
    steps, losses = zip(*curve, strict=True)
    axis.plot(steps, [np.nan if loss is None else loss for loss in losses], linewidth=1, **style)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def layer_grid(values: Mapping[str, float]) -> tuple[list[str], list[str], Float[ndarray, "blocks kinds"]]:
    """
    Arranges values of layers, given by parameter name, in a grid over blocks and kinds of layers.

    "model.layers.3.mlp.up_proj.weight" is in row "3" and column "up_proj". Where blocks are in several lists, their
    rows are named by both: "layer1.0", "layer2.0". Kinds with the same last name keep their path ("attn.c_proj",
    "mlp.c_proj"). Layers that differ only in a further number (experts, also if the number comes last) share a cell,
    which holds their mean. A name without a number is in row "-".

    Returns:
        names of the rows, names of the columns, and the values (blocks, kinds); NaN where no such layer exists.
    """
    cells: dict[tuple[tuple[str, int], str], list[float]] = {}
    for name, value in values.items():
        cells.setdefault(place(name), []).append(value)
    lists = list(dict.fromkeys(within for (within, _), _ in cells))
    blocks = sorted({block for block, _ in cells}, key=lambda block: (block[1] >= 0, lists.index(block[0]), block[1]))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for (block, kind), found in cells.items():
        grid[blocks.index(block), kinds.index(kind)] = np.mean(found)
    return _block_names(blocks), _short(kinds), grid


def place(parameter: str) -> tuple[tuple[str, int], str]:
    """
    Returns the block of a layer, as the name of the list it is in and its number (-1 for none), and its path in it.

    In the path "*" replaces further numbers; a number at the end is dropped.
    """
    path = parameter.removesuffix(".weight")
    number = re.search(r"\.(\d+)\.", path)
    if number is None:
        return ("", -1), path
    kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", re.sub(r"\.\d+$", "", path[number.end() :]))
    return (path[: number.start()], int(number.group(1))), kind


def _block_names(blocks: list[tuple[str, int]]) -> list[str]:
    """Returns the number of every block, after what tells its list from the others, if there are several."""
    lists = [within.split(".") for within, number in blocks if number >= 0]
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*lists, strict=False))))
    return ["-" if n < 0 else ".".join([*within.split(".")[shared:], str(n)]) for within, n in blocks]


def _short(kinds: list[str]) -> list[str]:
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return [short if last.count(short) == 1 else kind for kind, short in zip(kinds, last, strict=True)]


def draw_layers(axis: Axes, losses: dict[str, float | None], sparsity: dict[str, float]) -> None:
    """Draws a heat map of the reconstruction loss of every layer or, if none was measured, of its sparsity."""
    measured = {name: loss for name, loss in losses.items() if loss is not None}
    values, title = (measured, "squared error of layer outputs, relative") if measured else (sparsity, "sparsity")
    blocks, kinds, grid = layer_grid(values)
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    every = max(1, len(blocks) // 10)
    axis.set_yticks(range(0, len(blocks), every), blocks[::every])
    axis.set_ylabel("block")
    axis.set_title(title)
    axis.figure.colorbar(image, ax=axis)


@plain_text
def heat_map(values: Mapping[str, float], label: str, *, percent: bool) -> str:
    """
    Draws `layer_grid` as a heat map with the values written into the cells, unless there are too many.

    Args:
        values: values by parameter name, at least one.
        label: label of the colour bar.
        percent: True for fractions, on a scale from 0 to 100 %. False for errors, on a logarithmic scale if all are
            positive and differ by more than a factor of 20.

    Returns:
        a PNG in a `data:` URI.
    """
    blocks, kinds, grid = layer_grid(values)
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    spread = not percent and low > 0 and high > 20 * low
    norm = LogNorm(low, high) if spread else Normalize(0, 1 if percent else max(high, 1e-12))
    figure, axis = subplots(figsize=(max(5.0, min(14.0, 2.2 + 0.85 * len(kinds))), min(24.0, 1.7 + 0.3 * len(blocks))))
    image = axis.imshow(grid, aspect="auto", cmap="Blues" if percent else "YlOrRd", norm=norm)
    axis.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    every = -(-len(blocks) // 70)
    axis.set_yticks(range(0, len(blocks), every), blocks[::every])
    axis.set_ylabel("block")
    bar = figure.colorbar(image, ax=axis, label=label, format=PercentFormatter(1) if percent else "%g")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    if len(blocks) <= 70 and len(kinds) <= 14:
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                text = f"{value:.1%}" if percent else f"{value:.2g}"
                colour = "white" if norm(value) > 0.6 else "black"
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return embedded(figure)


def draw_corner(keep: Bool[ndarray, "out in"]) -> str:
    """Returns the upper left corner of a mask as a PNG in a `data:` URI; a pixel is a weight, black if kept."""
    file = io.BytesIO()
    imsave(file, keep[: CORNER[0], : CORNER[1]], cmap="gray_r", vmin=0, vmax=1, format="png")
    return _uri(file.getvalue())
