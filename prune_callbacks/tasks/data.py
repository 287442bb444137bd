"""TokenDataModule: windows of tokens for training, calibration and evaluation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from prune_callbacks.calibration.windows import contiguous_windows, joined_windows, random_windows
from prune_callbacks.tasks.corpora import SHARES, Corpus, Part, TextFile
from prune_callbacks.tasks.loader import ResumableData, Windows
from prune_callbacks.tasks.named_corpora import corpus
from prune_callbacks.tasks.rows import as_text
from prune_callbacks.tasks.tokens import begins_with_bos, encode, name_of


class TokenDataModule(ResumableData):
    """
    A data module that cuts corpora into windows of `seq_len` tokens; batches are `{"input_ids": (batch, seq_len)}`.

    Training and evaluation windows are contiguous; evaluation windows keep the order of the text. Calibration windows
    are drawn at random. Both follow the protocols of the pruning papers.

    No special token is added but BOS, where the tokenizer begins a text with it (Gemma, Llama): models that were
    trained so are far worse without. Every window, for training, calibration and evaluation, is then BOS and
    `seq_len - 1` tokens of text. Chats are written by the tokenizer's chat template, with its special tokens.

    With several ranks, `batch_size` is the batch size of each rank, and the ranks share the windows. Some windows are
    used twice if their number is not a multiple of the number of ranks.

    Training that resumes from a checkpoint, also in the middle of an epoch, continues with the next batch on the same
    number of ranks. Lightning 2.6 itself repeats a batch if a fit that is limited only by `max_steps` resumes from a
    checkpoint that was written at the end of an epoch; configure `ModelCheckpoint` to count steps in that case.

    Args:
        tokenizer: tokenizer of the model.
        train: corpus to train on; this and the next three may be a corpus, or its name or path (see `corpus`).
        calibration: corpus to calibrate pruning on.
        evaluation: corpus for perplexity.
        evaluate: names or paths of further corpora for perplexity.
        root: folder with the files of named corpora; None: the Hub.
        seq_len: tokens per window.
        batch_size: windows per training batch.
        train_windows: number of windows from the start of the corpus; None for all.
        calibration_windows: number of windows to draw; it is an error if the corpus holds fewer.
        calibration_batch_size: windows per calibration and evaluation batch.
        evaluation_windows: number of windows from the start of every evaluation corpus; None for all.
        seed: seed that draws the calibration windows and shuffles the training windows.
        bos: whether windows begin with BOS; None: if the tokenizer begins a text with it.
        join_rows: whether documents are joined with blank lines, in a random order, to cut calibration windows; None:
            if there are several and none fills a window.

    Attributes:
        evaluation_windows: token ids (windows, seq_len) of the evaluation corpus, after `setup`; `train_windows` and
            `calibration_windows` likewise.
        evaluation_title: title of the evaluation corpus; it says so if windows begin with BOS.
        further_evaluation: title and windows of every corpus in `evaluate`, by its name or the name of its file, after
            `setup`.
        bos: whether windows begin with BOS.
        text_setting: how text became windows, for reports: `bos`, and after `setup` `calibration_rows`, "joined" or
            "separate".

    Raises:
        ValueError: a corpus is unknown, its file is missing, two corpora in `evaluate` have the same name, or `bos` is
            True and the tokenizer has no BOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Corpus | str | Path,
        calibration: Corpus | str | Path,
        evaluation: Corpus | str | Path,
        *,
        evaluate: Sequence[str] | str = (),
        root: str | Path | None = None,
        seq_len: int = 512,
        batch_size: int = 4,
        train_windows: int | None = None,
        calibration_windows: int = 128,
        calibration_batch_size: int = 4,
        evaluation_windows: int | None = None,
        seed: int = 0,
        bos: bool | None = None,
        join_rows: bool | None = None,
    ) -> None:
        super().__init__(batch_size, seed)
        if seq_len < 2 or calibration_windows < 1:
            raise ValueError(
                f"TokenDataModule needs seq_len >= 2 and calibration_windows >= 1, "
                f"got {seq_len} and {calibration_windows}"
            )
        self.tokenizer = tokenizer
        self.bos = begins_with_bos(tokenizer) if bos is None else bos
        if self.bos and getattr(tokenizer, "bos_token_id", None) is None:
            raise ValueError(f"bos=True, and the tokenizer of {name_of(tokenizer)} has no BOS token: leave bos out")
        self.join_rows = join_rows
        self.text_setting: dict[str, Any] = {"bos": self.bos}
        parts: tuple[tuple[Part, Corpus | str | Path], ...]
        parts = (("train", train), ("calibration", calibration), ("evaluation", evaluation))
        self.corpora: dict[str, Corpus] = {
            part: corpus(str(given), part, root) if isinstance(given, str | Path) else given for part, given in parts
        }
        self.evaluation_title = self._evaluation_title(self.corpora["evaluation"])
        evaluate = [evaluate] if isinstance(evaluate, str) else evaluate
        self._further = {Path(name).name: corpus(name, "evaluation", root) for name in evaluate}
        if len(self._further) < len(evaluate):
            raise ValueError(f"evaluate names one corpus twice: {list(evaluate)}")
        self.seq_len = seq_len
        self.calibration_batch_size = calibration_batch_size
        self._limits = {"train": train_windows, "calibration": calibration_windows, "evaluation": evaluation_windows}
        self.train_windows: Int[Tensor, "windows tokens"] | None = None
        self.calibration_windows: Int[Tensor, "windows tokens"] | None = None
        self.evaluation_windows: Int[Tensor, "windows tokens"] | None = None
        self.further_evaluation: dict[str, tuple[str, Tensor]] = {}

    @classmethod
    def from_text_file(
        cls, tokenizer: PreTrainedTokenizerBase, path: str, field: str = "text", **settings: Any
    ) -> "TokenDataModule":
        """Returns a data module on three disjoint parts of one local `.txt` or `.jsonl` file; see `TextFile`."""
        train, calibration, evaluation = (TextFile(path, part, field) for part in SHARES)
        return cls(tokenizer, train, calibration, evaluation, **settings)

    @property
    def setting(self) -> dict[str, str | int | None]:
        """
        Returns the settings, besides the tokenizer, that determine the calibration and evaluation windows.

        What has no effect is left out, so that files from before there was such a setting still fit.
        """
        parts: tuple[Part, ...] = ("calibration", "evaluation")
        texts: dict[str, str] = {part: self.corpora[part].title for part in parts}
        texts |= {f"{part}_source": repr(self.corpora[part]) for part in parts}
        if self.join_rows:
            texts["calibration_source"] += ", rows joined"
        counts = {f"{part}_windows": self._limits[part] for part in parts}
        first = {"bos": True} if self.bos else {}
        return texts | counts | {"seq_len": self.seq_len, "seed": self.seed} | first

    def setup(self, stage: str) -> None:
        """Reads and tokenizes the corpora once; raises ValueError, naming the corpus, if its text is too short."""
        if self.train_windows is None:
            self.train_windows = self._contiguous("train", self.corpora["train"])
            self.evaluation_windows = self._contiguous("evaluation", self.corpora["evaluation"])
            for name, further in self._further.items():
                cut = self._contiguous("evaluation", further)
                self.further_evaluation[name] = self._evaluation_title(further), cut
            self.calibration_windows = self._drawn(self.corpora["calibration"])

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of shuffled training windows, which resumes after the batches of a loaded checkpoint."""
        assert self.train_windows is not None
        return self._shuffled(Windows(self.train_windows))

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of the calibration windows, for `OneShotPrune`."""
        assert self.calibration_windows is not None
        return self._in_order(self.calibration_windows)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of the evaluation windows, in order."""
        assert self.evaluation_windows is not None
        return self._in_order(self.evaluation_windows)

    def _in_order(self, windows: Tensor) -> DataLoader[Any]:
        # Its own generator, as in `_shuffled`.
        return DataLoader(Windows(windows), self.calibration_batch_size, generator=torch.Generator())

    def _evaluation_title(self, source: Corpus) -> str:
        # Part of the title, because perplexities with and without BOS cannot be compared.
        return f"{source.title}, BOS first" if self.bos else source.title

    def _contiguous(self, part: str, source: Corpus) -> Tensor:
        limit = self._limits[part]
        return self._cut(part, source, lambda texts, length: contiguous_windows(texts, self._encode, length, limit))

    def _drawn(self, source: Corpus) -> Tensor:
        """Returns the calibration windows, and notes whether rows were joined for them."""
        count = self._limits["calibration"]
        assert count is not None

        def draw(texts: Sequence[str], length: int) -> Tensor:
            join = self.join_rows
            if join is None:
                join = len(texts) > 1 and not any(len(self._encode(text)) >= length for text in texts)
            self.text_setting["calibration_rows"] = "joined" if join else "separate"
            return (joined_windows if join else random_windows)(texts, self._encode, count, length, self.seed)

        return self._cut("calibration", source, draw)

    def _cut(self, part: str, source: Corpus, cut: Callable[[Sequence[str], int], Tensor]) -> Tensor:
        """Returns windows of a corpus, which `cut` makes of its texts and a number of tokens."""
        named = f"the {part} corpus, {source.title}"
        texts = [self._text(document, f"{named}: document {n}") for n, document in enumerate(source.documents(), 1)]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise ValueError(f"{named}, holds no text")
        try:
            windows = cut(texts, self.seq_len - self.bos)
        except ValueError as error:
            raise ValueError(f"{named}: {error}" + (" (BOS is one more token of each)" if self.bos else "")) from error
        if not self.bos:
            return windows
        return torch.cat([windows.new_full((len(windows), 1), self.tokenizer.bos_token_id), windows], dim=1)

    def _text(self, document: Any, place: str) -> str:
        text = as_text(document, self.tokenizer, place)
        # Chat templates write BOS too, and a second one at the beginning of a window is as bad as none.
        return text.removeprefix(str(self.tokenizer.bos_token)) if self.bos else text

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)
