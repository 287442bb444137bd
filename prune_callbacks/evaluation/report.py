"""Writes and reads the files of a run's folder, and prints a summary of the run."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    write_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once, under another name first; its folder is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def repeat_command(argv: Sequence[str]) -> str | None:
    """The shell line that repeats a run of train.py, in a folder of its own; None if `argv` is of another program."""
    if not argv or Path(argv[0]).name != "train.py":
        return None
    left_out = ("output_dir", "ckpt_path")
    return shlex.join(
        [
            "python",
            "train.py",
            *(argument for argument in argv[1:] if argument.split("=")[0].lstrip("+") not in left_out),
        ]
    )


def read_report(dirpath: Path) -> dict[str, Any] | None:
    """What the `report.json` of a run's folder holds; None if there is none yet."""
    path = dirpath / "report.json"
    record: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return record


def open_results(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """
    The cells that an earlier measurement of the same setting has written, to go on from; empty if there was none.

    Raises:
        ValueError: the file holds results of another setting.
    """
    results: dict[str, Any] = {"setting": setting, "cells": {}}
    if path.is_file():
        results = json.loads(path.read_text())
        if results["setting"] != setting:
            before = results["setting"]
            told = "; ".join(
                f"{key} was {before.get(key)!r} and is {setting.get(key)!r}"
                for key in {**before, **setting}
                if before.get(key) != setting.get(key)
            )
            raise ValueError(
                f"{path} holds results of another setting: {told}. Choose another folder, or give the same setting "
                "again to go on"
            )
    return results


def summary_table(record: dict[str, Any]) -> None:
    """Prints a run's result as a table on the terminal."""
    measured = record["perplexity"]
    table = Table(title=f"{record['recipe'] or 'run'}: {record['model'] or 'model'}, {record['pruner']}")
    table.add_column("")
    table.add_column(f"perplexity on {measured['dataset'] or 'evaluation text'}\n(windows of {measured['seq_len']})")
    for stage in STAGES:
        note = " (model/ with adapter/)" if stage == "recovered" and record["adapter"] else ""
        table.add_row(stage, optional_number(measured[stage]) + note)
    table.add_section()
    base = " (base; the adapter is dense)" if record["adapter"] else ""
    table.add_row("zeros in pruned layers", f"{record['sparsity']['achieved']:.2%}{base}")
    table.add_row("weights violating masks", str(sum(record["violations"].values())))
    Console().print(table)
    if record.get("corpora") or record.get("zero_shot"):
        Console().print(_further_table(record))
    if record["rounds"]:
        Console().print(_rounds_table(record))


def _further_table(record: dict[str, Any]) -> Table:
    table = Table(title="further texts (perplexity) and tasks (accuracy)")
    for column in ("", *STAGES):
        table.add_column(column, justify="right" if column else "left")
    for name, text in record.get("corpora", {}).items():
        table.add_row(text["dataset"] or name, *(optional_number(text.get(stage)) for stage in STAGES))
    for task, result in record.get("zero_shot", {}).items():
        measured = [result.get(stage) for stage in STAGES]
        table.add_row(f"{task} ({result['metric']})", *("-" if m is None else f"{m['value']:.1%}" for m in measured))
    return table


def _rounds_table(record: dict[str, Any]) -> Table:
    table = Table(title="the trained model at the end of every round")
    for column in ("round", "optimizer step", "zeros in pruned layers", "perplexity"):
        table.add_column(column, justify="right")
    for number, entry in enumerate(record["rounds"]):
        table.add_row(str(number), str(entry["step"]), f"{entry['sparsity']:.2%}", optional_number(entry["perplexity"]))
    return table


def optional_number(value: float | None) -> str:
    """Formats a perplexity for a table; a dash where it was not measured."""
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    from prune_callbacks.evaluation.comparison import main

    sys.exit(main(sys.argv[1:]))
