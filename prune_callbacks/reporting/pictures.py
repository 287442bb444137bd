"""Draws pictures of one run, and of several runs side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

from prune_callbacks.reporting.drawing import (
    draw_layers,
    draw_perplexity,
    draw_rounds,
    draw_training,
    save,
    subplots,
    title_perplexity,
)
from prune_callbacks.reporting.summary import optional_number
from prune_callbacks.storage.run_record import STAGES, RunRecord


def compare(records: Mapping[str, RunRecord], path: Path) -> None:
    """
    Prints the results of several runs side by side, and draws perplexity over sparsity with a curve for each run.

    Args:
        records: the record of each run (its `report.json`), by the name of the run.
        path: the picture.
    """
    first = next(iter(records.values())).perplexity
    table = Table(title=f"perplexity on {first.dataset or 'evaluation text'} (windows of {first.seq_len})")
    for column in ("run", "optimizer steps", "dense", "pruned", "recovered", "zeros", "violations"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, record in records.items():
        stages = [optional_number(record.perplexity.at(stage)) for stage in STAGES]
        achieved = f"{record.sparsity.achieved:.2%}"
        table.add_row(
            name, str(record.optimizer_steps), *stages, achieved, str(sum((record.violations or {}).values()))
        )
    Console().print(table)
    figure, axis = subplots(figsize=(8, 5))
    for name, record in records.items():
        draw_rounds(axis, record.rounds, f"{name}, {record.optimizer_steps} steps in all")
    axis.set_title(f"held-out perplexity, {first.dataset or 'evaluation text'}, windows of {first.seq_len} tokens")
    if axis.get_legend_handles_labels()[0]:  # only runs with rounds have a curve
        axis.legend()
    save(figure, path)


def draw_report(record: RunRecord, path: Path) -> None:
    """Draws perplexities, the training curve, and a heat map of the reconstruction loss of every layer."""
    figure, axes = subplots(1, 3, figsize=(15, 5), width_ratios=(1, 1.4, 1.6))
    how = record.schedule or record.pruner
    figure.suptitle(f"{record.model or 'model'}: {how}, {record.sparsity.achieved:.1%} zeros")
    if record.rounds:
        draw_rounds(axes[0], record.rounds, "trained")
        title_perplexity(axes[0], record.perplexity)
    else:
        draw_perplexity(axes[0], record.perplexity)
    draw_training(axes[1], record.training_loss, record.changes)
    draw_layers(axes[2], record.reconstruction_loss, record.sparsity.layers)
    save(figure, path)


def draw_sparsity(history: list[dict[str, Any]], path: Path) -> None:
    """Draws the sparsity of all layers over the steps, their mean, and the steps with violated masks."""
    figure, axis = subplots(figsize=(8, 5))
    steps = [entry["step"] for entry in history]
    layers = list(history[-1]["sparsity"])
    values = np.array([[entry["sparsity"][layer] for layer in layers] for entry in history])
    axis.step(steps, values, where="post", color="#4c78a8", linewidth=0.5, alpha=0.4)
    axis.step(steps, values.mean(1), where="post", color="#1f3b57", linewidth=2, label=f"mean of {len(layers)} layers")
    violated = [(e["step"], m) for e, m in zip(history, values.mean(1), strict=True) if any(e["violations"].values())]
    if violated:
        axis.plot(*zip(*violated, strict=True), "x", color="#e45756", label="pruned weights that are not zero")
    axis.set_title("zeros in every layer" + ("" if violated else "; no mask was ever violated"))
    axis.set_xlabel("optimizer step")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
