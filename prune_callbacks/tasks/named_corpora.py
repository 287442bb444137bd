"""The corpora of the pruning papers by name, from the Hub or from a folder of their published files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prune_callbacks.tasks.corpora import Corpus, HubText, Part, PythonDocs, TextFile, read_lines

NAMES = ("wikitext2", "ptb", "c4", "lambada", "python_docs")
C4_ROWS = 1100
"""Number of documents of C4's validation shard in the papers' perplexity; enough for 256 windows of 2048 tokens."""


def corpus(name: str, part: Part, root: str | Path | None = None) -> Corpus:
    """
    Returns a corpus by its name, or by the path of a local file.

    The texts are those of the SparseGPT and Wanda papers. WikiText-2 is the raw version, with rows joined by blank
    lines. Penn Treebank is Mikolov's, with its `<unk>` and `N`, and sentences joined by spaces. C4 is the first
    validation documents joined by spaces for evaluation, and single documents for calibration and training. LAMBADA is
    OpenAI's detokenised form of the test passages, joined by blank lines. No other text is detokenised.

    Args:
        name: "wikitext2", "ptb", "c4", "lambada", "python_docs" (see `PythonDocs`), or the path of a `.txt`, `.raw` or
            `.jsonl` file, whose last 15 % of lines are for evaluation and the 15 % before for calibration (see
            `TextFile`).
        part: "train", "calibration" or "evaluation". Evaluation uses the test split (for C4, validation), the other
            parts use the training split. LAMBADA has test passages only and supports "evaluation" only.
        root: folder with the published files (see `local_files`); None: the Hub.

    Raises:
        ValueError: no corpus or file has that name, the folder lacks the file of the corpus, or LAMBADA is requested
            for training or calibration.
    """
    if name == "python_docs":
        return PythonDocs(part)
    if name == "lambada" and part != "evaluation":
        raise ValueError(
            f"lambada has test passages only, for evaluation, and was given for {part}; a file of passages that is "
            "named by its path is cut into parts"
        )
    if name in NAMES:
        return _from_hub(name, part) if root is None else _from_folder(name, part, Path(root))
    if Path(name).suffix not in (".txt", ".raw", ".jsonl"):
        raise ValueError(
            f"no corpus {name!r}: accepted are {', '.join(NAMES)} and the path of a .txt, .raw or .jsonl file"
        )
    if not Path(name).is_file():
        raise ValueError(f"no text file at {name}")
    return TextFile(name, part)


def local_files(name: str, part: Part) -> Sequence[str]:
    """Returns glob patterns for the file of a named corpus in a root folder; the first pattern that matches counts."""
    split = "test" if part == "evaluation" else "train"
    if name == "wikitext2":
        return tuple(f"{folder}/wiki.{split}.raw" for folder in ("wikitext2-raw", "wikitext-2-raw"))
    if name == "ptb":
        return (f"ptb/ptb.{split}.txt",)
    if name == "lambada":
        return ("lambada/lambada_test.jsonl",)
    which = "validation" if part == "evaluation" else "train"
    return tuple(f"c4/{folder}*{which}*.{suffix}" for folder in ("", "en/") for suffix in ("jsonl", "json.gz"))


def _from_hub(name: str, part: Part) -> Corpus:
    split = "test" if part == "evaluation" else "train"
    if name == "wikitext2":
        return HubText("Salesforce/wikitext", "wikitext-2-raw-v1", split, join="\n\n")
    if name == "ptb":  # published as a script, which `datasets` no longer runs; the Hub has a converted copy
        revision = "refs/convert/parquet"
        return HubText("ptb-text-only/ptb_text_only", "penn_treebank", split, None, "sentence", " ", None, revision)
    if name == "lambada":
        return HubText("EleutherAI/lambada_openai", "default", "test", join="\n\n")
    if part == "evaluation":
        shard = "en/c4-validation.00000-of-00008.json.gz"
        return HubText("allenai/c4", split="validation", data_files=shard, join=" ", limit=C4_ROWS)
    shard = f"en/c4-train.0000{int(part == 'train')}-of-01024.json.gz"
    return HubText("allenai/c4", split="train", data_files=shard, limit=20000)


def _from_folder(name: str, part: Part, root: Path) -> Corpus:
    patterns = local_files(name, part)
    found = next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)
    if found is None:
        what = f"{name}'s {part} text"
        raise ValueError(
            f"{root} has no file of {what}: looked for {' and '.join(patterns)}. Put it there, name a file by its path "
            "in place of the corpus, or leave out root to load it from the Hub"
        )
    if name == "lambada":
        return TextFile(str(found))
    if name == "c4":
        if part == "evaluation":
            return HubText("json", data_files=str(found), join=" ", limit=C4_ROWS)
        return HubText("json", data_files=str(found))
    test = "test" if part == "evaluation" else "train"
    if name == "ptb":
        return Lines(str(found), f"Penn Treebank {test}", join=" ", keep_ends=False)
    return Lines(str(found), f"WikiText-2 raw {test}", join="\n\n", keep_ends=True)


@dataclass(frozen=True)
class Lines:
    """
    A file with one row per line, split into the same rows as on the Hub and joined into one document.

    Args:
        path: the file.
        title: title of the corpus for reports.
        join: the string between rows.
        keep_ends: True: rows keep their newline, and blank rows are empty (WikiText). False: rows are stripped.
    """

    path: str
    title: str
    join: str
    keep_ends: bool

    def documents(self) -> list[str]:
        """Returns one document; raises ValueError if the file is in no UTF-8."""
        lines = [line.replace("\r\n", "\n") for line in read_lines(Path(self.path), newline="\n")]
        rows = [(line if line.strip() else "") if self.keep_ends else line.strip() for line in lines]
        return [self.join.join(rows)]
