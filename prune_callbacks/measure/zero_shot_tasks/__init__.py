"""
Zero-shot tasks over local files: the YAML files in this folder, and the functions that read their data.

`lm_eval` can also run them directly:

    lm_eval --include_path FOLDER_OF_THIS_FILE --tasks local_hellaswag --metadata root=FOLDER_OF_THE_DATA ...
"""

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

_BEGUN = re.compile(r"(.*[.!?][\"')]* )([^.!?]+)", re.DOTALL)
"""Matches a text whose last sentence is incomplete: the text before that sentence, and the sentence."""


def read(root: str, file: str, labels: str | None = None, **_: Any) -> dict[str, Dataset]:
    """
    Reads the examples of a task in the order of the file, in the form that `lm_eval` needs; never from a cache.

    Args:
        root: the folder of the data.
        file: path in that folder of the file with the examples, one JSON object per line.
        labels: path of a file with the correct answer of every example, one integer per line, which becomes `label`.
        _: further keyword arguments that `lm_eval` passes about the task and the model.

    Returns:
        the examples as the split "test".

    Raises:
        ValueError: a file is missing, empty or has another format, or the number of labels differs from the examples.
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
    Returns the context that HellaSwag's endings continue, with the capital letter that `lm_eval` writes.

    `lm_eval` capitalises the incomplete sentence (`ctx_b`, in ActivityNet's examples). The local file has it in lower
    case, as in the data set: "A man is sitting on a roof. he" becomes "... He". A sentence is incomplete if it has no
    final punctuation. In the whole file this holds for the first 3,243 examples, those of ActivityNet, and no others.
    """
    query = str(example["query"])
    begun = _BEGUN.fullmatch(query)
    return query if begun is None else begun[1] + begun[2].capitalize()
