"""The measurements of RunReport: perplexity on every text, and zero-shot accuracy."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.calibration.checks import check_window_length
from prune_callbacks.callbacks.lightning_internals import resumed_checkpoint
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.model_in_setup import model_in_setup
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.measure.zero_shot import ZeroShot
from prune_callbacks.memory import free_memory, model_bytes
from prune_callbacks.parallel.strategies import world
from prune_callbacks.storage.model_folder import savable
from prune_callbacks.storage.run_record import Perplexities, RunRecord


@dataclass(frozen=True)
class RunQuality:
    """
    Measures the quality of the model at one stage of a run.

    Args:
        tokenizer: the tokenizer for `zero_shot`; None without tasks.
        batch_size: evaluation windows per forward pass.
        zero_shot: the tasks to measure accuracy on; None: no tasks.
        progress: show progress bars.
    """

    tokenizer: PreTrainedTokenizerBase | None
    batch_size: int
    zero_shot: ZeroShot | None
    progress: bool

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError for a missing model, windows that it cannot take, or tasks that this fit cannot measure."""
        windows = getattr(trainer.datamodule, "evaluation_windows", None)
        if windows is None:
            raise ValueError("RunReport needs a data module with evaluation_windows, such as TokenDataModule")
        prune = Lineup(trainer).first(OneShotPrune)
        if prune is not None and resumed_checkpoint(trainer) is None:
            model_in_setup("OneShotPrune", pl_module, prune.blocks)
        savable(find_language_model(pl_module))
        further = getattr(trainer.datamodule, "further_evaluation", {})
        for text in (windows, *(others for _, others in further.values())):
            check_window_length(find_language_model(pl_module), text.shape[1], "the evaluation windows")
        if self.zero_shot is None:
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"zero-shot accuracy is measured on one process, and this fit has {trainer.world_size}. Leave "
                "zero_shot out, and measure model/ of the run's folder afterwards: ZeroShot(...)(model, tokenizer)"
            )
        self.zero_shot.check()

    def fits(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Returns whether every rank's device can hold the whole unsharded model; the same answer on every rank."""
        needed, device = model_bytes(find_language_model(pl_module)), trainer.strategy.root_device
        fits = all(world(trainer).gather(needed < 0.9 * free_memory(device)))
        if not fits:
            rank_zero_warn(
                f"the dense model takes {needed / 2**30:.1f} GiB before it is sharded, more than {device} has: its "
                "quality is not measured"
            )
        return fits

    def perplexity(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Returns the perplexity on the data module's evaluation windows."""
        with _on_its_device(trainer, pl_module) as model:
            return self._perplexity(trainer, model, trainer.datamodule.evaluation_windows)

    def measure(self, trainer: Trainer, pl_module: LightningModule, stage: str, record: RunRecord) -> float:
        """Measures perplexities and accuracies, writes them into the record, and returns the first perplexity."""
        data = trainer.datamodule
        windows, title = data.evaluation_windows, getattr(data, "evaluation_title", None)
        with _on_its_device(trainer, pl_module) as model:
            value = self._perplexity(trainer, model, windows)
            if (record.perplexity.dataset, record.perplexity.seq_len) not in ((None, None), (title, windows.shape[1])):
                record.perplexity = Perplexities()  # the resumed run was measured on another text
            record.perplexity = replace(record.perplexity, dataset=title, seq_len=windows.shape[1])
            setattr(record.perplexity, stage, finite(value))
            _say(stage, value, windows)
            record.text = dict(getattr(data, "text_setting", {}))
            corpora = record.corpora
            for name, (further, others) in getattr(data, "further_evaluation", {}).items():
                same = torch.equal(others, windows)
                again = value if same else self._perplexity(trainer, model, others)
                known = {"dataset": further, "seq_len": others.shape[1], "windows": len(others)}
                corpora[name] = _of_the_same(corpora.get(name, {}), known) | {stage: finite(again)}
                _say(f"{stage} {name}", again, others)
            if self.zero_shot is not None:
                self._zero_shot(self.zero_shot, model, stage, record)
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


def finite(value: float) -> float | None:
    """Returns None for inf and NaN, which JSON cannot represent."""
    return value if math.isfinite(value) else None


def _say(what: str, value: float, windows: Tensor) -> None:
    """Logs a perplexity, on rank 0."""
    rank_zero_info(f"{what} perplexity {value:.2f} ({len(windows)} windows of {windows.shape[1]} tokens)")


@contextmanager
def _on_its_device(trainer: Trainer, pl_module: LightningModule) -> Iterator[nn.Module]:
    """Moves the language model to the trainer's device and back: in setup and after the fit it is on the CPU."""
    model = find_language_model(pl_module)
    home, device = next(model.parameters()).device, trainer.strategy.root_device
    if home.type != device.type:
        model.to(device)
    yield model
    if home.type != device.type:
        model.to(home)
