"""The measurements of RunReport: perplexity on every text, validation metrics, and zero-shot accuracy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.calibration.checks import check_window_length
from prune_callbacks.callbacks.built_later import BuiltFromFiles, files_of, shapes_in_setup, shapes_of
from prune_callbacks.callbacks.lightning_internals import resumed_checkpoint
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.callbacks.validation_metrics import check_validation, on_its_device, validation_metrics
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.measure.zero_shot import ZeroShot
from prune_callbacks.memory import free_memory, model_bytes
from prune_callbacks.parallel.strategies import world
from prune_callbacks.ranks import Ranks, patient_ranks
from prune_callbacks.storage.model_folder import check_savable
from prune_callbacks.storage.run_record import STAGES, Perplexities, RunRecord
from prune_callbacks.streaming.perplexity import checkpoint_perplexity


@dataclass(frozen=True)
class RunQuality:
    """
    Measures the quality of the model at one stage of a run.

    Args:
        tokenizer: the tokenizer for `zero_shot`; None without tasks.
        batch_size: evaluation windows per forward pass.
        zero_shot: the tasks to measure accuracy on; None: no tasks.
        progress: show progress bars.
        validation: whether to measure the module's own validation metrics; None: where there are no evaluation windows.
    """

    tokenizer: PreTrainedTokenizerBase | None
    batch_size: int
    zero_shot: ZeroShot | None
    progress: bool
    validation: bool | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError for a missing model, windows that it cannot take, or what this fit cannot measure."""
        windows = _windows(trainer)
        if self._validates(trainer):
            check_validation(trainer, pl_module)
        elif windows is None:
            raise ValueError(
                "RunReport(validation=False) needs a data module with evaluation_windows, such as TokenDataModule"
            )
        prune = Lineup(trainer).first(OneShotPrune)
        if prune is not None and resumed_checkpoint(trainer) is None:
            model = shapes_in_setup("OneShotPrune", pl_module, prune.blocks)
        else:
            model = shapes_of(pl_module)
        check_savable(model)
        if not (windows is None and self.zero_shot is None) and not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"perplexity and zero-shot accuracy are those of a transformers model, got {type(model).__name__}: "
                "leave out evaluation_windows and zero_shot, and RunReport measures the module's own validation metrics"
            )
        further = getattr(trainer.datamodule, "further_evaluation", {})
        for text in (windows, *(others for _, others in further.values())):
            if text is not None:
                check_window_length(model, text.shape[1], "the evaluation windows")
        if self.zero_shot is None:
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"zero-shot accuracy is measured on one process, and this fit has {trainer.world_size}. Leave "
                "zero_shot out, and measure model/ of the run's folder afterwards: ZeroShot(...)(model, tokenizer)"
            )
        self.zero_shot.check()

    def dense(self, trainer: Trainer, pl_module: LightningModule, dirpath: Path, record: RunRecord) -> None:
        """
        Measures the dense model before it is pruned, and writes that into the record; a collective.

        Where no rank's device can hold it, a warning says so. Of one that is built later, perplexity alone is measured,
        from its files, and hidden states are in files in a folder of `dirpath` meanwhile.
        """
        folder = files_of(pl_module)
        if folder is None:
            if self._fits(trainer, pl_module):
                self.measure(trainer, pl_module, "dense", record)
            return
        if self._validates(trainer) or self.zero_shot is not None:
            rank_zero_warn(
                f"the dense model in {folder} is pruned before it is built: its validation metrics and zero-shot "
                "accuracy are not measured"
            )
        if _windows(trainer) is not None:
            with patient_ranks(trainer.strategy.root_device) as ranks:
                self._texts(
                    trainer, partial(self._of_files, trainer, pl_module, folder, dirpath, ranks), "dense", record
                )

    def _of_files(
        self, trainer: Trainer, pl_module: LightningModule, folder: Path, dirpath: Path, ranks: Ranks, windows: Tensor
    ) -> float:
        """Returns the perplexity of the model in a folder, with one block of it in memory at a time."""
        assert isinstance(pl_module, BuiltFromFiles)
        return checkpoint_perplexity(
            folder,
            windows,
            dirpath,
            batch_size=self.batch_size,
            dtype=pl_module.dtype_of_path,
            device=trainer.strategy.root_device,
            progress=self.progress,
            ranks=ranks,
        )

    def _fits(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Returns whether every rank's device can hold the whole unsharded model; the same answer on every rank."""
        needed, device = model_bytes(find_language_model(pl_module)), trainer.strategy.root_device
        fits = all(world(trainer).gather(needed < 0.9 * free_memory(device)))
        if not fits:
            rank_zero_warn(
                f"the dense model takes {needed / 2**30:.1f} GiB before it is sharded, more than {device} has: its "
                "quality is not measured"
            )
        return fits

    def at_round(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Measures what the entry of a round has: perplexity on the evaluation windows, and validation metrics."""
        windows, value = _windows(trainer), None
        if windows is not None:
            with on_its_device(trainer, model := find_language_model(pl_module)):
                value = self._perplexity(trainer, model, windows)
        return _entry(value, self._metrics(trainer, pl_module))

    def measure(self, trainer: Trainer, pl_module: LightningModule, stage: str, record: RunRecord) -> dict[str, Any]:
        """Measures all there is to measure, writes it into the record, and returns what the entry of a round has."""
        model, value = find_language_model(pl_module), None
        with on_its_device(trainer, model):
            if _windows(trainer) is not None:
                value = self._texts(trainer, partial(self._perplexity, trainer, model), stage, record)
            if self.zero_shot is not None:
                self._zero_shot(self.zero_shot, model, stage, record)
        metrics = self._metrics(trainer, pl_module)
        for name, metric in metrics.items():
            record.metrics.setdefault(name, dict.fromkeys(STAGES))[stage] = finite(metric)
        if metrics:
            rank_zero_info(f"{stage} {', '.join(f'{name} {metric:.4g}' for name, metric in metrics.items())}")
        return _entry(value, metrics)

    def _validates(self, trainer: Trainer) -> bool:
        """Returns whether the module's own validation is measured."""
        return _windows(trainer) is None if self.validation is None else self.validation

    def _metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        if not self._validates(trainer):
            return {}
        metrics = validation_metrics(trainer, pl_module)
        if not metrics:
            raise ValueError(
                f"RunReport measures what {type(pl_module).__name__} logs in its validation, and it logs nothing: add "
                'self.log("val_accuracy", ...) to validation_step, or leave RunReport out'
            )
        return metrics

    def _texts(self, trainer: Trainer, measured: Callable[[Tensor], float], stage: str, record: RunRecord) -> float:
        """Measures perplexity on every text, writes it into the record, and returns the first."""
        data = trainer.datamodule
        windows, title = data.evaluation_windows, getattr(data, "evaluation_title", None)
        value = measured(windows)
        if (record.perplexity.dataset, record.perplexity.seq_len) not in ((None, None), (title, windows.shape[1])):
            record.perplexity = Perplexities()  # the resumed run was measured on another text
        record.perplexity = replace(record.perplexity, dataset=title, seq_len=windows.shape[1])
        setattr(record.perplexity, stage, finite(value))
        _say(stage, value, windows)
        record.text = dict(getattr(data, "text_setting", {}))
        corpora = record.corpora
        for name, (further, others) in getattr(data, "further_evaluation", {}).items():
            same = torch.equal(others, windows)
            again = value if same else measured(others)
            known = {"dataset": further, "seq_len": others.shape[1], "windows": len(others)}
            corpora[name] = _of_the_same(corpora.get(name, {}), known) | {stage: finite(again)}
            _say(f"{stage} {name}", again, others)
        return value

    def _perplexity(self, trainer: Trainer, model: nn.Module, windows: Tensor) -> float:
        progress = self.progress and trainer.is_global_zero
        return perplexity(model, windows, batch_size=self.batch_size, progress=progress, ranks=world(trainer))

    def _zero_shot(self, zero_shot: ZeroShot, model: nn.Module, stage: str, record: RunRecord) -> None:
        """Measures the accuracy on every task and writes it into the record."""
        assert self.tokenizer is not None
        results = zero_shot(model, self.tokenizer)
        accuracies = record.zero_shot
        for task, result in results.items():
            measured = {key: result.pop(key) for key in ("value", "stderr", "all")}
            accuracies[task] = _of_the_same(accuracies.get(task, {}), result) | {stage: measured}
            error = "" if measured["stderr"] is None else f" ± {measured['stderr']:.2%}"
            rank_zero_info(f"{stage} {task} {result['metric']} {measured['value']:.2%}{error}")


def _of_the_same(before: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Returns `known` and the earlier values; drops these if a resumed run measured them with other settings."""
    same = all(before.get(key, value) == value for key, value in known.items())
    return (before if same else {}) | known


def _windows(trainer: Trainer) -> Tensor | None:
    """Returns the data module's evaluation windows; None if it has none."""
    return getattr(trainer.datamodule, "evaluation_windows", None)


def _entry(perplexity: float | None, metrics: dict[str, float]) -> dict[str, Any]:
    """Returns what the entry of a round has of the quality."""
    entry: dict[str, Any] = {"perplexity": None if perplexity is None else finite(perplexity)}
    return entry | ({"metrics": {name: finite(value) for name, value in metrics.items()}} if metrics else {})


def finite(value: float) -> float | None:
    """Returns None for inf and NaN, which JSON cannot represent."""
    return value if math.isfinite(value) else None


def _say(what: str, value: float, windows: Tensor) -> None:
    """Logs a perplexity, on rank 0."""
    rank_zero_info(f"{what} perplexity {value:.2f} ({len(windows)} windows of {windows.shape[1]} tokens)")
