"""Prints the result of a run as tables on the terminal."""

from rich.console import Console
from rich.table import Table

from prune_callbacks.storage.run_record import STAGES, RunRecord


def summary_table(record: RunRecord) -> None:
    """Prints a run's result as a table on the terminal."""
    measured = record.perplexity
    table = Table(title=f"{record.recipe or 'run'}: {record.model or 'model'}, {record.pruner}")
    table.add_column("")
    table.add_column(f"perplexity on {measured.dataset or 'evaluation text'}\n(windows of {measured.seq_len})")
    for stage in STAGES:
        note = " (model/ with adapter/)" if stage == "recovered" and record.adapter else ""
        table.add_row(stage, optional_number(measured.at(stage)) + note)
    table.add_section()
    base = " (base; the adapter is dense)" if record.adapter else ""
    table.add_row("zeros in pruned layers", f"{record.sparsity.achieved:.2%}{base}")
    table.add_row("weights violating masks", str(sum((record.violations or {}).values())))
    Console().print(table)
    if record.corpora or record.zero_shot:
        Console().print(_further_table(record))
    if record.rounds:
        Console().print(_rounds_table(record))


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


def _rounds_table(record: RunRecord) -> Table:
    table = Table(title="the trained model at the end of every round")
    for column in ("round", "optimizer step", "zeros in pruned layers", "perplexity"):
        table.add_column(column, justify="right")
    for number, entry in enumerate(record.rounds):
        table.add_row(str(number), str(entry["step"]), f"{entry['sparsity']:.2%}", optional_number(entry["perplexity"]))
    return table


def optional_number(value: float | None) -> str:
    """Formats a perplexity for a table; returns a dash if it was not measured."""
    return "-" if value is None else f"{value:.2f}"
