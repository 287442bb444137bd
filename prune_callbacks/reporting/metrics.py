"""Shows what modules log in their own validation, of one run or several; which direction is better is not known."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from prune_callbacks.reporting.drawing import COLOURS, draw_rounds, embedded, plain_text, subplots
from prune_callbacks.storage.run_record import STAGES, RunRecord

PANELS = 9
"""Number of curves that a picture has at most; tables have all metrics."""


def plain_number(value: float | None) -> str:
    """Formats a metric with four significant digits; returns a dash if it was not measured, or was not finite."""
    return "-" if value is None else f"{value:.4g}"


def metric_names(records: Iterable[RunRecord]) -> list[str]:
    """Returns the names of all metrics of the runs, in the order in which they are logged."""
    return list(dict.fromkeys(name for record in records for name in record.metrics))


def quantities(records: Sequence[RunRecord]) -> list[str | None]:
    """Returns what is known of the quality of the runs: None for perplexity, and the names of metrics."""
    only_metrics = any(record.metrics for record in records) and not any(map(_has_perplexity, records))
    return [*([] if only_metrics else [None]), *metric_names(records)]


def _has_perplexity(record: RunRecord) -> bool:
    return any(record.perplexity.at(stage) is not None for stage in STAGES)


def metric_table(records: Mapping[str, RunRecord], title: str) -> Table:
    """Returns the metrics of runs, by the name of the run, as a table for the terminal."""
    table = Table(title=title)
    for column in ("run", "metric", *STAGES):
        table.add_column(column, justify="right" if column in STAGES else "left")
    for run, record in records.items():
        for name, values in record.metrics.items():
            table.add_row(escape(run), escape(name), *(plain_number(values.get(stage)) for stage in STAGES))
    return table


def curves_of_rounds(
    rounds: Mapping[str, list[dict[str, Any]]], shown: Sequence[str | None], perplexity: str = "perplexity"
) -> Figure:
    """
    Draws every quantity over sparsity, with a curve for each run.

    Args:
        rounds: the rounds of each run, by its name.
        shown: the quantities, as `quantities` returns them, at least one.
        perplexity: the label of its axis.
    """
    drawn = shown[:PANELS]
    columns = min(len(drawn), 3)
    lines = -(-len(drawn) // columns)
    figure, axes = subplots(lines, columns, figsize=(9 if columns == 1 else 5 * columns, 3.6 * lines), squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(drawn):
            axis.set_axis_off()
            continue
        for run, points in rounds.items():
            draw_rounds(axis, points, run, drawn[place])
        if drawn[place] is None:
            axis.set_ylabel(perplexity)
        if len(rounds) > 1 and axis.get_legend_handles_labels()[0]:  # only runs with rounds have a curve
            axis.legend(fontsize=8)
    return figure


@plain_text
def metric_curves(records: Mapping[str, RunRecord]) -> str | None:
    """Draws every metric of runs over sparsity, as a `data:` URI; None if no round has any."""
    rounds = {name: record.rounds for name, record in records.items()}
    if not any("metrics" in entry for entries in rounds.values() for entry in entries):
        return None
    return embedded(curves_of_rounds(rounds, metric_names(records.values())))


def draw_metric(axis: Axes, name: str, values: Mapping[str, float | None]) -> None:
    """Draws a bar for the value of a metric at every measured stage."""
    known = {stage: value for stage in STAGES if (value := values.get(stage)) is not None}
    bars = axis.bar(list(known), list(known.values()), color=[COLOURS[stage] for stage in known])
    axis.bar_label(bars, fmt="%.4g")
    axis.set_title(name, fontsize=10)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
