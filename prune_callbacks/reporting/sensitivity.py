"""The picture of a sensitivity study."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.ticker import NullFormatter

from prune_callbacks.reporting.drawing import layer_grid, plain_text, save, subplots


@plain_text
def draw_sensitivity(increase: Mapping[str, float], dense: float, seq_len: int, path: Path) -> None:
    """
    Draws the increase in perplexity as a heat map over blocks and kinds of layers, or as bars if units are blocks.

    Args:
        increase: increase in perplexity, by the name of the layer or the block that was pruned alone.
        dense: perplexity of the dense model.
        seq_len: tokens per window.
        path: the picture.
    """
    of_blocks = all(name.rpartition(".")[2].isdigit() for name in increase)
    blocks, kinds, grid = layer_grid({name + ".block" * of_blocks: value for name, value in increase.items()})
    size = max(5.0, 2.5 + 0.9 * len(kinds)), min(24.0, 2.0 + 0.3 * len(blocks))
    figure, axis = subplots(figsize=size)
    axis.set_yticks(range(len(blocks)), blocks)
    if of_blocks:
        axis.barh(range(len(blocks)), grid[:, 0], color="#e45756")
        axis.invert_yaxis()
        axis.set_xlabel("increase in perplexity")
        axis.spines[["top", "right"]].set_visible(False)
    else:
        # One layer may increase perplexity a hundred times as much as the others, and some layers decrease it.
        reach = max(float(np.nanmax(np.abs(grid))), 1e-12)
        norm = SymLogNorm(reach / 100, vmin=-reach, vmax=reach)
        image = axis.imshow(grid, aspect="auto", cmap="RdBu_r", norm=norm)
        axis.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                colour = "white" if abs(norm(value) - 0.5) > 0.35 else "black"
                axis.text(column, row, f"{value:+.2g}", ha="center", va="center", fontsize=8, color=colour)
        ticks = [sign * reach * share for sign, share in ((-1, 1), (-1, 0.1), (0, 0), (1, 0.1), (1, 1))]
        bar = figure.colorbar(image, ax=axis, label="increase in perplexity (logarithmic)", ticks=ticks, format="%+.2g")
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("decoder block pruned alone" if of_blocks else "decoder block of the layer pruned alone")
    axis.set_title(
        f"how much perplexity rises when one is pruned\n(dense {dense:.2f}, windows of {seq_len} tokens)", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
