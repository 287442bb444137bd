"""Draws what block reconstruction brought, block by block."""

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import MaxNLocator

from prune_callbacks.reporting.drawing import COLOURS, embedded, plain_text, subplots


@plain_text
def reconstruction_picture(record: Mapping[str, Any]) -> str:
    """
    Draws the loss of every block before and after reconstruction.

    Args:
        record: the `reconstruction` of a `RunRecord`.

    Returns:
        a PNG in a `data:` URI.
    """
    blocks = record["blocks"]
    figure, axis = subplots(figsize=(9, 3.2))
    for key, label, colour in (("before", "pruned", "pruned"), ("after", "reconstructed", "recovered")):
        values = [block[key] for block in blocks]
        axis.plot(range(len(blocks)), values, marker=".", label=label, color=COLOURS[colour])
    axis.set_xlabel(f"block, from {blocks[0]['name']} on")
    axis.set_ylabel(
        "relative squared error\non " + ("held-out windows" if record["held_out"] else "the training windows")
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return embedded(figure)
