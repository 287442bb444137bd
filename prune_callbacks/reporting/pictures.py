"""Draws pictures of one run, and of several runs side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
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
from prune_callbacks.reporting.metrics import curves_of_rounds, draw_metric, metric_table, quantities
from prune_callbacks.reporting.summary import optional_number
from prune_callbacks.storage.run_record import STAGES, RunRecord

IN_A_REPORT = 4
"""Number of perplexity and metrics that `report.png` has at most."""


def compare(records: Mapping[str, RunRecord], path: Path) -> None:
    """
    Prints the results of several runs side by side, and draws their quality over sparsity with a curve for each run.

    Quality is perplexity, where it was measured, and the validation metrics.

    Args:
        records: the record of each run (its `report.json`), by the name of the run.
        path: the picture.
    """
    first = next(iter(records.values())).perplexity
    shown = quantities(list(records.values()))
    measured = STAGES if None in shown else ()
    on = f"perplexity on {first.dataset or 'evaluation text'} (windows of {first.seq_len})"
    table = Table(title=on if measured else "runs side by side")
    for column in ("run", "optimizer steps", *measured, "zeros", "violations"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, record in records.items():
        stages = [optional_number(record.perplexity.at(stage)) for stage in measured]
        achieved = f"{record.sparsity.achieved:.2%}"
        table.add_row(
            name, str(record.optimizer_steps), *stages, achieved, str(sum((record.violations or {}).values()))
        )
    Console().print(table)
    if any(record.metrics for record in records.values()):
        Console().print(metric_table(records, "validation metrics"))
    figure = curves_of_rounds(
        {f"{name}, {record.optimizer_steps} steps in all": record.rounds for name, record in records.items()}, shown
    )
    if measured:
        figure.suptitle(f"held-out {on}")
    save(figure, path)


def draw_report(record: RunRecord, path: Path) -> None:
    """Draws the quality, the training curve, and a heat map of the reconstruction loss of every layer."""
    shown = quantities([record])[:IN_A_REPORT]
    figure, axes = subplots(
        len(shown), 3, figsize=(15, max(5, 2 * len(shown))), width_ratios=(1, 1.4, 1.6), squeeze=False
    )
    for axis in axes[:, 1:].flat:  # the two other panels are as high as all of the first column
        axis.remove()
    grid = axes[0, 0].get_gridspec()
    how = record.schedule or record.pruner
    figure.suptitle(f"{record.model or 'model'}: {how}, {record.sparsity.achieved:.1%} zeros")
    for axis, name in zip(axes[:, 0], shown, strict=True):
        _quality(axis, record, name)
    draw_training(figure.add_subplot(grid[:, 1]), record.training_loss, record.changes)
    draw_layers(figure.add_subplot(grid[:, 2]), record.reconstruction_loss, record.sparsity.layers)
    save(figure, path)


def _quality(axis: Axes, record: RunRecord, metric: str | None) -> None:
    """Draws perplexity or a metric: over sparsity if the run has rounds, else a bar for every stage."""
    if record.rounds:
        draw_rounds(axis, record.rounds, "trained", metric)
    if metric is None and record.rounds:
        title_perplexity(axis, record.perplexity)
    elif metric is None:
        draw_perplexity(axis, record.perplexity)
    elif not record.rounds:
        draw_metric(axis, metric, record.metrics[metric])


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
