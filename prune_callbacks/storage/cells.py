"""The result file of a measurement with many cells, which can be interrupted and continued."""

import json
from pathlib import Path
from typing import Any


def open_results(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """
    Returns the results in a file, to continue the measurement; without a file, new results without cells.

    Args:
        path: the JSON file.
        setting: plain values that determine the results, such as pruner and windows.

    Returns:
        `{"setting": setting, "cells": {...}}`.

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
                f"{path} holds results of another setting: {told}. Choose another folder, or use the same setting "
                "again to continue"
            )
    return results
