"""Builds the table of comparable runs, with a column for every run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from prune_callbacks.reporting.metrics import metric_names, plain_number, quantities
from prune_callbacks.reporting.page import NONE, duration, number, percent, share_recovered, size
from prune_callbacks.storage.run_record import STAGES, RunRecord

SETTINGS = {
    "recipe": "recipe",
    "pruner": "pruner",
    "allocation": "allocation over layers",
    "schedule": "schedule",
    "optimizer_steps": "optimizer steps",
    "precision": "precision",
    "strategy": "strategy",
    "processes": "processes",
    "device": "device",
    "command": "command",
}


class Row(NamedTuple):
    """One row of the table, with a cell for each run; `best` holds the indices of the best values."""

    name: str
    cells: list[str]
    best: tuple[int, ...] = ()
    code: bool = False

    @property
    def differs(self) -> bool:
        """Returns whether the runs differ in this row."""
        return len(set(self.cells)) > 1


def sections(records: Sequence[RunRecord]) -> dict[str, list[Row]]:
    """Returns the rows of the table by section title; each row has a cell for every record."""
    quality = []
    if None in quantities(records):
        quality += [_perplexity(stage, "perplexity", [r.perplexity.at(stage) for r in records]) for stage in STAGES]
        quality += [Row("of what pruning cost, taken back", [percent(share_recovered(r), 0) for r in records])]
    for name in metric_names(records):
        values = [r.metrics.get(name, {}) for r in records]
        quality += [Row(f"{stage} {name}", [plain_number(v.get(stage)) for v in values]) for stage in STAGES]
    quality += [
        Row("zeros in pruned layers", [percent(r.sparsity.achieved) for r in records]),
        Row(
            "weights violating masks",
            [NONE if r.violations is None else str(sum(r.violations.values())) for r in records],
        ),
    ]
    settings = [
        Row(title, [NONE if getattr(r, key) is None else str(getattr(r, key)) for r in records], code=True)
        for key, title in SETTINGS.items()
    ]
    versions = dict.fromkeys(name for r in records for name in r.versions)
    settings += [Row(name, [r.versions.get(name, NONE) for r in records], code=True) for name in versions]
    costs = [
        Row("pruning", [duration(r.seconds.prune) for r in records]),
        Row("training", [duration(r.seconds.recover) for r in records]),
        Row("measuring quality", [duration(r.seconds.evaluate) for r in records]),
        Row("peak memory", [size(r.peak_memory_bytes) for r in records]),
        Row("skipped layers", [str(len(r.skipped)) for r in records]),
        Row("warnings", [NONE if r.warnings is None else str(len(r.warnings)) for r in records]),
    ]
    further = [row for row in _corpora(records) + _zero_shot(records) if set(row.cells) != {NONE}]
    return (
        {"Quality": quality}
        | ({"Further texts and tasks": further} if further else {})
        | {"Settings": settings, "Costs": costs}
    )


def _perplexity(stage: str, title: str, values: Sequence[float | None]) -> Row:
    """Returns a row of perplexities; marks the lowest of a sparse stage as best, if not all values are equal."""
    known = [value for value in values if value is not None]
    shown = [number(value) for value in values]
    best = [place for place, value in enumerate(values) if value is not None and value == min(known)]
    return Row(f"{stage} {title}", shown, tuple(best) if len(set(known)) > 1 and stage != "dense" else ())


def _corpora(records: Sequence[RunRecord]) -> list[Row]:
    """Returns a row for every stage on every text; values measured in another way get rows of their own."""
    ways = dict.fromkeys(
        (name, c.get("dataset"), c.get("seq_len"), c.get("windows")) for r in records for name, c in r.corpora.items()
    )
    rows = []
    for name, *way in ways:
        same = [
            c if c and [c.get("dataset"), c.get("seq_len"), c.get("windows")] == way else {}
            for c in (r.corpora.get(name) for r in records)
        ]
        title = f"perplexity, {way[0] or name}, {way[2]} windows of {way[1]}"
        rows += [_perplexity(stage, title, [c.get(stage) for c in same]) for stage in STAGES]
    return rows


def _zero_shot(records: Sequence[RunRecord]) -> list[Row]:
    """Returns a row for every stage on every task; values measured on other examples get rows of their own."""
    ways = dict.fromkeys(
        (task, z["metric"], z["limit"], z["examples"], z.get("data"))
        for r in records
        for task, z in r.zero_shot.items()
    )
    rows = []
    for task, *way in ways:
        same = [
            z if z and [z["metric"], z["limit"], z["examples"], z.get("data")] == way else {}
            for z in (r.zero_shot.get(task) for r in records)
        ]
        for stage in STAGES:
            cells = [_accuracy(z.get(stage)) for z in same]
            rows.append(Row(f"{stage} {task} ({way[0]}, {way[2]} examples)", cells))
    return rows


def _accuracy(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return NONE
    error = measured["stderr"]
    return percent(measured["value"]) + ("" if error is None else f" ± {percent(error)}")
