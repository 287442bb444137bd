"""TokenDataModule: windows of tokens for training, calibration and evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from prune_callbacks.calibration.windows import contiguous_windows, random_windows
from prune_callbacks.tasks.corpora import SHARES, Corpus, Part, TextFile
from prune_callbacks.tasks.loader import ResumableLoader, Shuffled, Windows
from prune_callbacks.tasks.named_corpora import corpus


class TokenDataModule(LightningDataModule):
    """
    A data module that cuts corpora into windows of `seq_len` tokens; batches are `{"input_ids": (batch, seq_len)}`.

    Training and evaluation windows are contiguous; evaluation windows keep the order of the text. Calibration windows
    are drawn at random. Both follow the protocols of the pruning papers. No special tokens are added.

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

    Attributes:
        evaluation_windows: token ids (windows, seq_len) of the evaluation corpus, after `setup`; `train_windows` and
            `calibration_windows` likewise.
        evaluation_title: title of the evaluation corpus.
        further_evaluation: title and windows of every corpus in `evaluate`, by its name or the name of its file, after
            `setup`.

    Raises:
        ValueError: a corpus is unknown, its file is missing, or two corpora in `evaluate` have the same name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Corpus | str,
        calibration: Corpus | str,
        evaluation: Corpus | str,
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
    ) -> None:
        super().__init__()
        if seq_len < 2 or calibration_windows < 1:
            raise ValueError(
                f"TokenDataModule needs seq_len >= 2 and calibration_windows >= 1, "
                f"got {seq_len} and {calibration_windows}"
            )
        self.tokenizer = tokenizer
        parts: tuple[tuple[Part, Corpus | str], ...]
        parts = (("train", train), ("calibration", calibration), ("evaluation", evaluation))
        self.corpora: dict[str, Corpus] = {
            part: corpus(given, part, root) if isinstance(given, str) else given for part, given in parts
        }
        self.evaluation_title = self.corpora["evaluation"].title
        evaluate = [evaluate] if isinstance(evaluate, str) else evaluate
        self._further = {Path(name).name: corpus(name, "evaluation", root) for name in evaluate}
        if len(self._further) < len(evaluate):
            raise ValueError(f"evaluate names one corpus twice: {list(evaluate)}")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.calibration_batch_size = calibration_batch_size
        self.seed = seed
        self._limits = {"train": train_windows, "calibration": calibration_windows, "evaluation": evaluation_windows}
        self._loader: ResumableLoader | None = None
        self._left_at: dict[str, int] | None = None
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
        """Returns the settings, besides the tokenizer, that determine the calibration and evaluation windows."""
        parts: tuple[Part, ...] = ("calibration", "evaluation")
        texts: dict[str, str] = {part: self.corpora[part].title for part in parts}
        texts |= {f"{part}_source": repr(self.corpora[part]) for part in parts}
        counts = {f"{part}_windows": self._limits[part] for part in parts}
        return texts | counts | {"seq_len": self.seq_len, "seed": self.seed}

    def setup(self, stage: str) -> None:
        """Reads and tokenizes the corpora once; raises ValueError, naming the corpus, if its text is too short."""
        if self.train_windows is None:
            self.train_windows = self._contiguous("train")
            self.evaluation_windows = self._contiguous("evaluation")
            for name, further in self._further.items():
                cut = self._cut("evaluation", further, contiguous_windows, self.seq_len, self._limits["evaluation"])
                self.further_evaluation[name] = further.title, cut
            count = self._limits["calibration"]
            assert count is not None
            self.calibration_windows = self._cut(
                "calibration", self.corpora["calibration"], random_windows, count, self.seq_len, self.seed
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of shuffled training windows, which resumes after the batches of a loaded checkpoint."""
        assert self.train_windows is not None
        windows = Windows(self.train_windows)
        ranks = {"num_replicas": 1, "rank": 0}
        if self.trainer is not None and self.trainer.world_size > 1:
            ranks = self.trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
        sampler = Shuffled(windows, ranks["num_replicas"], ranks["rank"], seed=self.seed)
        self._loader = ResumableLoader(windows, self.batch_size, sampler=sampler, generator=torch.Generator())
        if self._left_at is not None:
            self._loader.load_state_dict(self._left_at)
        return self._loader

    # Lightning restores the state of a loader only if none was made before the checkpoint is read, but it needs one to
    # estimate the length of the training. The state of a data module is restored early enough.
    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the training windows, for the checkpoint."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position in the training windows from a checkpoint."""
        self._left_at = state_dict or None
        if self._loader is not None and self._left_at is not None:  # some strategies restore after the loader is made
            self._loader.load_state_dict(self._left_at)

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of the calibration windows, for `OneShotPrune`."""
        assert self.calibration_windows is not None
        return self._in_order(self.calibration_windows)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of the evaluation windows, in order."""
        assert self.evaluation_windows is not None
        return self._in_order(self.evaluation_windows)

    def _in_order(self, windows: Tensor) -> DataLoader[Any]:
        # Without its own generator, a loader draws a number from the global one, which dropout uses too.
        return DataLoader(Windows(windows), self.calibration_batch_size, generator=torch.Generator())

    def _contiguous(self, part: str) -> Tensor:
        return self._cut(part, self.corpora[part], contiguous_windows, self.seq_len, self._limits[part])

    def _cut(self, part: str, source: Corpus, cut: Any, *args: Any) -> Tensor:
        documents = [text for text in source.documents() if text.strip()]
        if not documents:
            raise ValueError(f"the {part} corpus, {source.title}, holds no text")
        try:
            windows: Tensor = cut(documents, self._encode, *args)
        except ValueError as error:
            raise ValueError(f"the {part} corpus, {source.title}: {error}") from error
        return windows

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids and text.strip():
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path or type(self.tokenizer).__name__} makes no token of "
                "text: its files are missing or do not fit. Name another folder "
                "(model.tokenizer.pretrained_model_name_or_path= on the command line)"
            )
        return ids
