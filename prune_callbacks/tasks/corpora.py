"""Corpora: sources of documents."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from prune_callbacks.interfaces import compared_by_name
from prune_callbacks.tasks.rows import Chat, found, read_row

Part = Literal["train", "calibration", "evaluation"]
SHARES: dict[Part, float] = {"train": 0.7, "calibration": 0.15, "evaluation": 0.15}


@compared_by_name
@runtime_checkable
class Corpus(Protocol):
    """A named source of documents."""

    @property
    def title(self) -> str:
        """Returns the name of the corpus for reports."""

    def documents(self) -> Sequence[str | Chat]:
        """Returns the texts, in a fixed order; a `Chat` becomes one when the tokenizer is known."""


@dataclass(frozen=True)
class PythonDocs:
    """
    The Python language reference, which CPython ships as text (`pydoc_data.topics`); it needs no download.

    The reference repeats whole sections under several topics. Here every paragraph is used once and every topic belongs
    to one part, so that parts share no paragraph. The text depends on the Python version.

    Args:
        part: "train" (70 % of the characters), "calibration" or "evaluation" (15 % each).
    """

    part: Part

    @property
    def title(self) -> str:
        return f"Python language reference ({self.part})"

    def documents(self) -> list[str]:
        """Returns one document per topic; raises ValueError for an unknown part."""
        from pydoc_data.topics import topics

        _check_part(self.part)
        seen: set[str] = set()
        sizes: dict[Part, int] = dict.fromkeys(SHARES, 0)
        texts: dict[Part, list[str]] = {part: [] for part in SHARES}
        # The longest topics first: they contain the shorter ones that repeat their sections.
        for _, topic in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
            paragraphs = []
            for paragraph in topic.split("\n\n"):
                words = " ".join(paragraph.split())
                if words and words not in seen:
                    seen.add(words)
                    paragraphs.append(paragraph)
            text = "\n\n".join(paragraphs)
            part = min(SHARES, key=lambda p: sizes[p] / SHARES[p])
            sizes[part] += len(text)
            texts[part].append(text)
        return texts[self.part]


@dataclass(frozen=True)
class TextFile:
    """
    A local file in UTF-8: one document, or one document per line of a `.jsonl` (`.ndjson`, `.json`) file.

    Args:
        path: the file.
        part: None for the whole file, or one of three disjoint parts of its lines: the first 70 % ("train"), the next
            15 % ("calibration") or the last 15 % ("evaluation").
        field: the key of the text, or of a chat's messages, in a JSON line.
    """

    path: str
    part: Part | None = None
    field: str = "text"

    @property
    def title(self) -> str:
        return Path(self.path).name + (f" ({self.part})" if self.part else "")

    def documents(self) -> list[str | Chat]:
        """
        Returns the whole text, or one text or chat per JSON line.

        Raises ValueError if the file is missing, is not in UTF-8, has no text in the part, or a line is no JSON object
        with a text or a chat in the field.
        """
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"no text file at {self.path}")
        # Not splitlines(), which also cuts at U+2028 inside a JSON string.
        lines = list(enumerate(read_lines(path), 1))
        if self.part is not None:
            _check_part(self.part)
            ends = {"train": 0.7, "calibration": 0.85, "evaluation": 1.0}
            begins = {"train": 0.0, "calibration": 0.7, "evaluation": 0.85}
            lines = lines[round(begins[self.part] * len(lines)) : round(ends[self.part] * len(lines))]
        if not any(line.strip() for _, line in lines):
            raise ValueError(f"{self.path} holds no text" + (f" in its {self.part} part" if self.part else ""))
        if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
            return ["".join(line for _, line in lines)]
        return [self._document(line, f"{self.path}: line {number}") for number, line in lines if line.strip()]

    def _document(self, line: str, place: str) -> str | Chat:
        expected = f"is no JSON object with a {self.field!r} field"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} {expected}: {error}. A line holds one object") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place} {expected}: it is {found(row)}")
        return read_row(row, self.field, place, "JSON object")


def read_lines(path: Path, newline: str | None = None) -> list[str]:
    """
    Returns the lines of a file in UTF-8, with their ends; raises ValueError if it is in no UTF-8.

    Args:
        path: the file.
        newline: as in `open`.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:  # without the mark that some editors put first
            return list(io.StringIO(file.read()))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is no text in UTF-8: line {line} has the byte {error.object[error.start]:#04x} ({error.reason}). "
            "Save it in UTF-8, or name another file"
        ) from error


@dataclass(frozen=True)
class HubText:
    """
    A dataset on the Hub or on disk, loaded by `datasets.load_dataset`.

    Args:
        path: the dataset, e.g. "Salesforce/wikitext", or a format such as "json" with `data_files`.
        name: configuration of the dataset, e.g. "wikitext-2-raw-v1".
        split: e.g. "test".
        data_files: a single file to load as the split; None for all files.
        field: the column with the text, or with a chat's messages.
        join: the string that joins the rows into one document; None: every row is a document.
        limit: number of rows to stream from the start, instead of downloading all.
        revision: branch, tag or commit of the dataset.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | None = None
    field: str = "text"
    join: str | None = None
    limit: int | None = None
    revision: str | None = None

    @property
    def title(self) -> str:
        if Path(self.path).name == self.path and self.data_files is not None:  # a format such as "json"
            return Path(self.data_files).name
        return f"{self.path}{'/' + self.name if self.name else ''} {self.split}"

    def documents(self) -> list[str | Chat]:
        """
        Returns one text or chat per row, or all rows joined into one text.

        Raises ValueError if a row has neither in the field, or chats are to be joined.
        """
        import datasets

        files = None if self.data_files is None else {self.split: self.data_files}
        source = self.title if files is None else self.data_files
        try:
            rows = datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                data_files=files,
                streaming=self.limit is not None,
                revision=self.revision,
            )
            if self.limit is not None:
                rows = rows.take(self.limit)
            documents = [
                read_row(row, self.field, f"{source}: row {number}", "record") for number, row in enumerate(rows, 1)
            ]
        except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError) as error:  # they do not name the file
            raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
        if self.join is None:
            return documents
        texts = [document for document in documents if isinstance(document, str)]
        if len(texts) < len(documents):
            raise ValueError(
                f"{source}: join={self.join!r} joins texts, and {self.field!r} holds chats; leave join out"
            )
        return [self.join.join(texts)]


def _check_part(part: str) -> None:
    if part not in SHARES:
        raise ValueError(f"part must be one of {', '.join(SHARES)}, got {part!r}")
