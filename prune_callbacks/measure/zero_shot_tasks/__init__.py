"""
Zero-shot tasks over local files: the YAML files beside this one, and how they read what they name.

`lm_eval` runs them by itself too:

    lm_eval --include_path FOLDER_OF_THIS_FILE --tasks local_hellaswag --metadata root=FOLDER_OF_THE_DATA ...
"""

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

_BEGUN = re.compile(r"(.*[.!?][\"')]* )([^.!?]+)", re.DOTALL)
"""A text whose last sentence is only begun: what stands before that sentence, and its beginning."""


def read(root: str, file: str, labels: str | None = None, **_: Any) -> dict[str, Dataset]:
    """
    The examples of a task, in the file's order, as `lm_eval` asks for them; read anew every time, without a cache.

    Args:
        root: the folder of the data.
        file: the examples inside of it, one JSON object a line.
        labels: a file with the right answer of every example, one number a line; they become the key `label`.
        _: what else `lm_eval` knows of the task and the model.

    Raises:
        ValueError: a file is missing or holds something else.
    """
    rows = [_parsed(line, number, Path(root) / file) for number, line in enumerate(_lines(root, file), 1)]
    if labels is not None:
        answers = _lines(root, labels)
        if len(answers) != len(rows):
            raise ValueError(
                f"{Path(root) / labels} has {len(answers)} labels for the {len(rows)} examples of {Path(root) / file}"
            )
        rows = [row | {"label": int(answer)} for row, answer in zip(rows, answers, strict=True)]
    return {"test": Dataset.from_list(rows)}


def _lines(root: str, file: str) -> list[str]:
    path = Path(root) / file
    if not path.is_file():
        raise ValueError(f"a zero-shot task reads {path}, which does not exist: root= names a folder that has {file}")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no examples")
    return lines


def _parsed(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: an example is a JSON object, got {line[:60]!r}")
    return row


def hellaswag_query(example: dict[str, Any]) -> str:
    """
    What HellaSwag's endings go on from, with a capital where `lm_eval` has one.

    `lm_eval` writes the begun sentence (`ctx_b`, which ActivityNet's examples have) with a capital; the local file has
    it as in the data set, in small letters: "A man is sitting on a roof. he" becomes "... He". Which sentence is begun
    is told by its missing end; in the whole file that are the 3,243 examples in front, ActivityNet's, and no others.
    """
    query = str(example["query"])
    begun = _BEGUN.fullmatch(query)
    return query if begun is None else begun[1] + begun[2].capitalize()
