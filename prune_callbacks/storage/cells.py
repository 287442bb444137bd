"""The file of a measurement with many cells, which goes on where it was interrupted."""

import json
from pathlib import Path
from typing import Any


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
