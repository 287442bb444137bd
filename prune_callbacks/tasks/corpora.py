"""Corpora: sources of documents."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

Part = Literal["train", "calibration", "evaluation"]
SHARES: dict[Part, float] = {"train": 0.7, "calibration": 0.15, "evaluation": 0.15}


@runtime_checkable
class Corpus(Protocol):
    """A named source of documents."""

    @property
    def title(self) -> str:
        """Returns the name of the corpus for reports."""

    def documents(self) -> list[str]:
        """Returns the texts, in a fixed order."""


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
    A local `.txt` file (one document) or `.jsonl` file (one document per line).

    Args:
        path: the file.
        part: None for the whole file, or one of three disjoint parts of its lines: the first 70 % ("train"), the next
            15 % ("calibration") or the last 15 % ("evaluation").
        field: the key of the text in a `.jsonl` line.
    """

    path: str
    part: Part | None = None
    field: str = "text"

    @property
    def title(self) -> str:
        return Path(self.path).name + (f" ({self.part})" if self.part else "")

    def documents(self) -> list[str]:
        """
        Returns the whole text, or one text per line of a `.jsonl` file.

        Raises ValueError if the file is missing, has no text in the part, or a line is no JSON object with the field.
        """
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"no text file at {self.path}")
        with path.open(encoding="utf-8") as file:
            lines = list(enumerate(file, 1))  # not splitlines(), which also cuts at U+2028 inside a JSON string
        if self.part is not None:
            _check_part(self.part)
            ends = {"train": 0.7, "calibration": 0.85, "evaluation": 1.0}
            begins = {"train": 0.0, "calibration": 0.7, "evaluation": 0.85}
            lines = lines[round(begins[self.part] * len(lines)) : round(ends[self.part] * len(lines))]
        if not any(line.strip() for _, line in lines):
            raise ValueError(f"{self.path} holds no text" + (f" in its {self.part} part" if self.part else ""))
        if path.suffix != ".jsonl":
            return ["".join(line for _, line in lines)]
        return [self._text(line, number) for number, line in lines if line.strip()]

    def _text(self, line: str, number: int) -> str:
        try:
            return str(json.loads(line)[self.field])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: line {number} is no JSON object with a {self.field!r} field") from error


@dataclass(frozen=True)
class HubText:
    """
    A dataset on the Hub or on disk, loaded by `datasets.load_dataset`.

    Args:
        path: the dataset, e.g. "Salesforce/wikitext", or a format such as "json" with `data_files`.
        name: configuration of the dataset, e.g. "wikitext-2-raw-v1".
        split: e.g. "test".
        data_files: a single file to load as the split; None for all files.
        field: the column with the text.
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

    def documents(self) -> list[str]:
        """Returns one text per row, or all rows joined into one text."""
        import datasets

        files = None if self.data_files is None else {self.split: self.data_files}
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
        texts = [row[self.field] for row in rows]
        return texts if self.join is None else [self.join.join(texts)]


def _check_part(part: str) -> None:
    if part not in SHARES:
        raise ValueError(f"part must be one of {', '.join(SHARES)}, got {part!r}")
