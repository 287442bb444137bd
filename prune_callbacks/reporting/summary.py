"""Prints the result of a run as tables on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from prune_callbacks.reporting.metrics import plain_number, quantities
from prune_callbacks.storage.run_record import STAGES, RunRecord


def summary_table(record: RunRecord) -> None:
    """Prints a run's result as a table on the terminal."""
    measured, shown = record.perplexity, quantities([record])
    table = Table(title=f"{record.recipe or 'run'}: {record.model or 'model'}, {record.pruner}")
    table.add_column("")
    known = STAGES if None in shown else ()
    on = f"perplexity on {measured.dataset or 'evaluation text'}\n(windows of {measured.seq_len})"
    table.add_column(on if known else "")
    for stage in known:
        note = " (model/ with adapter/)" if stage == "recovered" and record.adapter else ""
        table.add_row(stage, optional_number(measured.at(stage)) + note)
    table.add_section()
    base = " (base; the adapter is dense)" if record.adapter else ""
    table.add_row("zeros in pruned layers", f"{record.sparsity.achieved:.2%}{base}")
    table.add_row("weights violating masks", str(sum((record.violations or {}).values())))
    Console().print(table)
    if record.metrics:
        Console().print(_metrics_table(record))
    if record.corpora or record.zero_shot:
        Console().print(_further_table(record))
    if record.rounds:
        Console().print(_rounds_table(record, shown))


def _metrics_table(record: RunRecord) -> Table:
    table = Table(title="what the module logs in its own validation")
    for column in ("", *STAGES):
        table.add_column(column, justify="right" if column else "left")
    for name, values in record.metrics.items():
        table.add_row(name, *(plain_number(values.get(stage)) for stage in STAGES))
    return table


def _further_table(record: RunRecord) -> Table:
    table = Table(title="further texts (perplexity) and tasks (accuracy)")
    for column in ("", *STAGES):
        table.add_column(column, justify="right" if column else "left")
    for name, text in record.corpora.items():
        table.add_row(text["dataset"] or name, *(optional_number(text.get(stage)) for stage in STAGES))
    for task, result in record.zero_shot.items():
        measured = [result.get(stage) for stage in STAGES]
        table.add_row(f"{task} ({result['metric']})", *("-" if m is None else f"{m['value']:.1%}" for m in measured))
    return table


def _rounds_table(record: RunRecord, shown: Sequence[str | None]) -> Table:
    table = Table(title="the trained model at the end of every round")
    for column in ("round", "optimizer step", "zeros in pruned layers", *(name or "perplexity" for name in shown)):
        table.add_column(column, justify="right")
    for number, entry in enumerate(record.rounds):
        metrics = entry.get("metrics", {})
        quality = [
            optional_number(entry["perplexity"]) if name is None else plain_number(metrics.get(name)) for name in shown
        ]
        table.add_row(str(number), str(entry["step"]), f"{entry['sparsity']:.2%}", *quality)
    return table


def optional_number(value: float | None) -> str:
    """Formats a perplexity for a table; returns a dash if it was not measured."""
    return "-" if value is None else f"{value:.2f}"
