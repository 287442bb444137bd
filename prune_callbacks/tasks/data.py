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
    Cuts corpora into windows of `seq_len` tokens; batches are `{"input_ids": (batch, seq_len)}`.

    Training and evaluation windows are contiguous, the evaluation text in order; calibration windows are drawn at
    random (the papers' protocols). No special tokens are added.

    Under a strategy of several ranks `batch_size` is that of each, and the ranks share the windows out (a few are used
    twice where they do not come out even).

    Training resumed from a checkpoint, in the middle of an epoch too, goes on with the batches that were to come, on as
    many ranks.
    (Lightning 2.6 itself repeats a batch where a fit that is limited by `max_steps` alone resumes from a checkpoint
    written at the end of an epoch; let `ModelCheckpoint` count steps there.)

    Args:
        tokenizer: of the model.
        train: corpus to train on; here and below a corpus, or its name or path (see `corpus`).
        calibration: corpus to calibrate pruning on.
        evaluation: corpus for perplexity.
        evaluate: names or paths of further corpora for perplexity.
        root: folder where named corpora are looked for; None: the Hub.
        seq_len: tokens per window.
        batch_size: windows per training batch.
        train_windows: use only the first so many; None for all.
        calibration_windows: how many to draw; an error if the corpus holds fewer.
        calibration_batch_size: windows per calibration and evaluation batch.
        evaluation_windows: use only the first so many of every corpus; None for all.
        seed: draws the calibration windows and shuffles the training windows.

    Attributes:
        evaluation_windows: the evaluation windows, (windows, seq_len), after `setup`.
        evaluation_title: what text they are from.
        further_evaluation: title and windows of every further corpus, by its name or the name of its file, after
            `setup`.

    Raises:
        ValueError: a corpus is unknown or its file is missing, or two of `evaluate` have one name.
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
        """Windows of one local `.txt` or `.jsonl` file, cut into three parts that do not overlap; see `TextFile`."""
        train, calibration, evaluation = (TextFile(path, part, field) for part in SHARES)
        return cls(tokenizer, train, calibration, evaluation, **settings)

    @property
    def setting(self) -> dict[str, str | int | None]:
        """What decides the calibration and evaluation windows, apart from the tokenizer; known before `setup`."""
        parts: tuple[Part, ...] = ("calibration", "evaluation")
        texts: dict[str, str] = {part: self.corpora[part].title for part in parts}
        texts |= {f"{part}_source": repr(self.corpora[part]) for part in parts}
        counts = {f"{part}_windows": self._limits[part] for part in parts}
        return texts | counts | {"seq_len": self.seq_len, "seed": self.seed}

    def setup(self, stage: str) -> None:
        """Reads and tokenizes the corpora, once."""
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

    # Lightning restores loaders only if none was made before the checkpoint is read, and the length of the training
    # cannot be estimated without one. A data module's state comes early enough.
    def state_dict(self) -> dict[str, Any]:
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._left_at = state_dict or None
        if self._loader is not None and self._left_at is not None:  # some strategies restore later than others
            self._loader.load_state_dict(self._left_at)

    def calibration_dataloader(self) -> DataLoader[Any]:
        """What `OneShotPrune` calibrates on."""
        assert self.calibration_windows is not None
        return self._in_order(self.calibration_windows)

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.evaluation_windows is not None
        return self._in_order(self.evaluation_windows)

    def _in_order(self, windows: Tensor) -> DataLoader[Any]:
        # A loader without a generator of its own takes a number from the one that dropout uses.
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
                "text: there are no files of a tokenizer, or none that fit. Name another folder "
                "(model.tokenizer.pretrained_model_name_or_path= on the command line)"
            )
        return ids
