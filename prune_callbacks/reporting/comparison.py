"""Compares runs side by side, in comparable groups: `python -m prune_callbacks.reporting RUN_A RUN_B`."""

import argparse
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prune_callbacks.reporting.drawing import COLOURS, draw_curve, draw_rounds, embedded, plain_text, subplots
from prune_callbacks.reporting.metrics import metric_curves, metric_names, metric_table
from prune_callbacks.reporting.page import NONE, number, percent, render, write_page
from prune_callbacks.reporting.side_by_side import sections
from prune_callbacks.storage.run_folder import Run, read_run
from prune_callbacks.storage.run_record import STAGES
from prune_callbacks.writing import write_text

Runs = dict[str, Run]


class Setting(NamedTuple):
    """The model and the evaluation text, or the module's own validation, that comparable runs share."""

    model: str
    architecture: str | None
    dataset: str | None
    seq_len: int | None
    only_metrics: bool = False

    def __str__(self) -> str:
        model = self.model + (f" ({self.architecture})" if self.architecture else "")
        if self.only_metrics:
            return f"{model}, by its own validation metrics"
        if self.seq_len is None:
            return f"{model}, nothing measured yet"
        return f"{model} on {self.dataset or 'the evaluation text'}, windows of {self.seq_len} tokens"


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code; exits with code 2 and a message for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m prune_callbacks.reporting",
        description="One RUN: writes its report.html again. Several: compares them, and writes compare.html.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the folder of a run, finished or not")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the page; its folder is created if needed")
    given = parser.parse_args(arguments)
    try:
        if len(given.runs) == 1:
            print(f"wrote {write_page(given.runs[0], given.output)}")
            return 0
        output = given.output or Path("compare.html")
        groups = write_comparison(given.runs, output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for setting, runs in groups.items():
        _print(setting, runs)
    if len(groups) > 1:
        print(f"These are {len(groups)} groups of different models, texts or context lengths: do not compare across.")
    print(f"wrote {output}")
    return 0


def write_comparison(dirpaths: Sequence[Path], path: Path) -> dict[Setting, Runs]:
    """
    Writes an HTML page that compares runs.

    Args:
        dirpaths: folders of the runs.
        path: the page.

    Returns:
        the runs by name, in groups of comparable runs.

    Raises:
        ValueError: a folder is named twice, or does not hold a run (see `read_run`).
    """
    seen: dict[Path, Path] = {}
    for dirpath in dirpaths:
        if dirpath.resolve() in seen:
            raise ValueError(f"{dirpath} is the same folder as {seen[dirpath.resolve()]}; name each run once")
        seen[dirpath.resolve()] = dirpath
    groups = grouped(dict(zip(_names(list(seen)), map(read_run, dirpaths), strict=True)))
    page = render(
        "compare.html",
        title=f"{len(dirpaths)} runs side by side",
        groups=[
            {
                "setting": str(setting),
                "only_metrics": setting.only_metrics,
                "runs": runs,
                "sections": sections([run.record for run in runs.values()]),
                "notes": notes(runs),
                "violated": violated(runs),
                "quality": _quality(runs, setting) if any(map(_measured, runs.values())) else None,
                "metrics": metric_curves({name: run.record for name, run in runs.items()}),
                "training": _training(runs) if any(run.record.training_loss for run in runs.values()) else None,
            }
            for setting, runs in groups.items()
        ],
    )
    write_text(path, page)
    return groups


def _names(folders: list[Path]) -> list[str]:
    """Returns the paths relative to their common parent folder, as names of the runs."""
    common = os.path.commonpath([folder.parent for folder in folders])
    return [os.path.relpath(folder, common) for folder in folders]


def grouped(runs: Runs) -> dict[Setting, Runs]:
    """
    Groups runs that can be compared with each other.

    Models with the same name but different architectures count as different models. A run that has not saved its model
    yet is assumed to have the architecture of the other runs with its model name, if these all agree.
    """
    known: dict[str | None, set[str]] = {}
    for run in runs.values():
        if run.architecture is not None:
            known.setdefault(run.record.model, set()).add(run.architecture)
    groups: dict[Setting, Runs] = {}
    for name, run in runs.items():
        model, measured = run.record.model, run.record.perplexity
        alike = known.get(model, set()) if model is not None else set()
        architecture = run.architecture or (next(iter(alike)) if len(alike) == 1 else None)
        title = model or ("unnamed model" if architecture else f"unknown model of {name}")
        setting = Setting(title, architecture, measured.dataset, measured.seq_len, run.record.only_metrics())
        groups.setdefault(setting, {})[name] = run
    return groups


def notes(runs: Runs) -> list[str]:
    """Returns warnings for the comparison of the runs in a group."""
    found = []
    dense = [
        run.record.perplexity.dense
        for run in runs.values()
        if not run.record.schedule and run.record.perplexity.dense is not None
    ]
    if dense and max(dense) > 1.01 * min(dense):
        found.append(
            "The dense models' perplexities differ by more than 1 %, so these runs did not start from the same weights "
            "or were not measured on the same windows, whatever their names say."
        )
    zeros = [value for run in runs.values() if (value := run.record.sparsity.achieved) is not None]
    if zeros and max(zeros) > min(zeros) + 0.005:
        found.append("The runs differ in how many weights they removed.")
    return found


def violated(runs: Runs) -> list[str]:
    """Returns a sentence for each run with pruned weights that are not zero."""
    counts = {name: sum((run.record.violations or {}).values()) for name, run in runs.items()}
    return [
        f"{name}: {count} pruned weights are not zero; its masks did not hold."
        for name, count in counts.items()
        if count
    ]


def _measured(run: Run) -> bool:
    return any(run.record.perplexity.at(stage) is not None for stage in STAGES)


@plain_text
def _quality(runs: Runs, setting: Setting) -> str:
    """Draws bars of all stages and, if runs differ in sparsity or have rounds, perplexity over sparsity."""
    zeros = {run.record.sparsity.achieved for run in runs.values()}
    curves = len(zeros - {None}) > 1 or any(run.record.rounds for run in runs.values())
    height = max(3.4, 0.9 + 0.75 * len(runs))
    figure, axes = subplots(1, 1 + curves, figsize=(12, height), squeeze=False)
    _bars(axes[0, 0], runs, setting)
    if curves:
        for name, run in runs.items():
            measured, achieved = run.record.perplexity.recovered, run.record.sparsity.achieved
            draw_rounds(axes[0, 1], run.record.rounds or [{"sparsity": achieved, "perplexity": measured}], name)
        axes[0, 1].set_ylabel(f"perplexity at the end, windows of {setting.seq_len}")
        axes[0, 1].legend(fontsize=8)
    return embedded(figure)


def _bars(axis: Axes, runs: Runs, setting: Setting) -> None:
    known = []
    for place, run in enumerate(runs.values()):
        for offset, stage in enumerate(STAGES):
            value = run.record.perplexity.at(stage)
            if value is not None:
                known.append(value)
                where = place + 0.27 * (offset - 1)
                axis.barh(where, value, height=0.25, color=COLOURS[stage], label=stage)
                axis.annotate(
                    number(value), (value, where), (3, 0), textcoords="offset points", va="center", fontsize=8
                )
    axis.set_yticks(range(len(runs)), [textwrap.fill(name, 28) for name in runs], fontsize=8)
    axis.invert_yaxis()
    if max(known) > 20 * min(known):
        axis.set_xscale("log")
        axis.set_xlim(min(known) / 2)
        axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.12)
    axis.set_xlabel(f"perplexity, windows of {setting.seq_len} tokens (lower is better)")
    stages = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(stages.values(), stages.keys(), fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


@plain_text
def _training(runs: Runs) -> str:
    figure, axis = subplots(figsize=(9, 3.6))
    for name, run in runs.items():
        if run.record.training_loss:
            draw_curve(axis, run.record.training_loss, label=name)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return embedded(figure)


def _print(setting: Setting, runs: Runs) -> None:
    """Prints the tables of a group on the terminal."""
    known = () if setting.only_metrics else STAGES
    table = Table(title=f"{'perplexity: ' if known else ''}{escape(str(setting))}")
    for column in ("run", *known, "zeros", "violations"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, run in runs.items():
        record = run.record
        stages = [number(record.perplexity.at(stage)) for stage in known]
        violations = NONE if record.violations is None else str(sum(record.violations.values()))
        unfinished = " (not complete)" if run.missing else ""
        zeros = percent(record.sparsity.achieved)
        table.add_row(escape(name) + unfinished, *stages, zeros, violations)
    Console().print(table)
    records = {name: run.record for name, run in runs.items()}
    if metric_names(records.values()):
        Console().print(metric_table(records, "validation metrics"))
