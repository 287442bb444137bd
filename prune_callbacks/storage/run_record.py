"""Writes and reads the files of a run's folder."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = ("dense", "pruned", "recovered")


def refuse_existing_run(dirpath: Path) -> None:
    """Raises ValueError if the folder already holds a run."""
    found = [name for name in ("report.json", "masks.safetensors", "model") if (dirpath / name).exists()]
    if found:
        raise ValueError(
            f"{dirpath} already holds a run ({', '.join(found)}). Choose another output_dir, delete the folder, or "
            "resume that run with ckpt_path="
        )


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
