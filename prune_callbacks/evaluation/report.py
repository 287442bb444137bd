"""A run's folder: what is written into it, drawn, and printed."""

import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

STAGES = ("dense", "pruned", "recovered")


def refuse_existing_run(dirpath: Path) -> None:
    """Raises ValueError if the folder already holds a run."""
    found = [name for name in ("report.json", "masks.safetensors", "model") if (dirpath / name).exists()]
    if found:
        raise ValueError(
            f"{dirpath} already holds a run ({', '.join(found)}). Choose another output_dir, delete the folder, or "
            "resume that run with ckpt_path="
        )


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a report; a reader never sees half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def summary_table(record: dict[str, Any]) -> None:
    """Prints a run's result as a table on the terminal."""
    measured = record["perplexity"]
    table = Table(title=f"{record['recipe'] or 'run'}: {record['model'] or 'model'}, {record['pruner']}")
    table.add_column("")
    table.add_column(f"perplexity on {measured['dataset'] or 'evaluation text'}\n(windows of {measured['seq_len']})")
    for stage in STAGES:
        table.add_row(stage, "-" if measured[stage] is None else f"{measured[stage]:.2f}")
    table.add_section()
    table.add_row("zeros in pruned layers", f"{record['sparsity']['achieved']:.2%}")
    table.add_row("weights violating masks", str(sum(record["violations"].values())))
    Console().print(table)


def draw_report(record: dict[str, Any], path: Path) -> None:
    """Draws perplexities, the training curve, and a heat map of what every layer lost."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), width_ratios=(1, 1.4, 1.6), layout="constrained")
    figure.suptitle(f"{record['model'] or 'model'}: {record['pruner']}, {record['sparsity']['achieved']:.1%} zeros")
    _draw_perplexity(axes[0], record["perplexity"])
    _draw_training(axes[1], record["training_loss"])
    _draw_layers(axes[2], record["reconstruction_loss"], record["sparsity"]["layers"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_perplexity(axis: Axes, measured: dict[str, Any]) -> None:
    stages = [stage for stage in STAGES if measured[stage] is not None]
    bars = axis.bar(
        stages, [measured[stage] for stage in stages], color=["#4c78a8", "#e45756", "#54a24b"][: len(stages)]
    )
    axis.bar_label(bars, fmt="%.1f")
    dataset = textwrap.fill(measured["dataset"] or "evaluation text", 30)
    axis.set_title(f"perplexity\n{dataset}\nwindows of {measured['seq_len']} tokens", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_training(axis: Axes, curve: list[list[int | float]]) -> None:
    axis.set_title("training loss with masks held")
    axis.set_xlabel("optimizer step")
    if curve:
        axis.plot(*zip(*curve, strict=True), color="#4c78a8", linewidth=1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axis.text(0.5, 0.5, "not trained yet", ha="center", va="center", transform=axis.transAxes)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_layers(axis: Axes, losses: dict[str, float | None], sparsity: dict[str, float]) -> None:
    measured = {name: loss for name, loss in losses.items() if loss is not None}
    values, title = (measured, "squared error of layer outputs, relative") if measured else (sparsity, "sparsity")
    places = {name: _place(name) for name in values}
    blocks = sorted({block for block, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for name, (block, kind) in places.items():
        grid[blocks.index(block), kinds.index(kind)] = values[name]
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axis.set_yticks(
        range(0, len(blocks), max(1, len(blocks) // 10)), [str(b) for b in blocks][:: max(1, len(blocks) // 10)]
    )
    axis.set_ylabel("decoder block")
    axis.set_title(title)
    axis.figure.colorbar(image, ax=axis)


def _place(parameter: str) -> tuple[int, str]:
    """Block number and layer kind: "model.layers.3.mlp.up_proj.weight" is (3, "up_proj")."""
    number = re.search(r"\.(\d+)\.", parameter)
    return int(number.group(1)) if number else 0, parameter.split(".")[-2]
