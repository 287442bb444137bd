"""RunReport: measures a run before and after pruning and after recovery, and writes its folder."""

import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from prune_callbacks.calibration import PruneReport, find_language_model, peak_memory, save_sparse_model
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.callbacks.trainer_state import resumed_checkpoint
from prune_callbacks.evaluation import perplexity
from prune_callbacks.evaluation.report import draw_report, refuse_existing_run, summary_table, write_json
from prune_callbacks.sparsity import MaskSet


class RunReport(Callback):
    """
    Writes `report.json`, `report.png`, `masks.safetensors` and `model/` into one folder.

    Put it **before** `OneShotPrune`: it measures the dense model in its own `setup`. The model and its masks are
    saved before the first training step (`OneShotPrune(save_dir=...)` does so earlier) and when training ends.

    Perplexity is measured on the data module's `evaluation_windows`, (windows, tokens) of token ids, and reported
    under its `evaluation_title`.

    Args:
        dirpath: the run's folder; refused if it already holds a run, unless the fit resumes from a checkpoint.
        recipe: name of the recipe, for the report.
        model: name of the model, for the report.
        tokenizer: saved beside the model, so that the folder is complete.
        batch_size: evaluation windows per forward pass.
        progress: show progress bars.

    Attributes:
        record: what `report.json` holds.
    """

    def __init__(
        self,
        dirpath: str | Path,
        *,
        recipe: str | None = None,
        model: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 1,
        progress: bool = True,
    ) -> None:
        self.dirpath = Path(dirpath)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.progress = progress
        self.record: dict[str, Any] = {
            "recipe": recipe,
            "model": model,
            "stage": "dense",
            "perplexity": {"dataset": None, "seq_len": None, "dense": None, "pruned": None, "recovered": None},
            "seconds": {"prune": None, "recover": 0.0, "evaluate": 0.0},
            "training_loss": [],
        }
        self._train_begin = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        names = [
            type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, RunReport | OneShotPrune)
        ]
        if names != ["RunReport", "OneShotPrune"]:
            raise ValueError(f"RunReport needs one OneShotPrune after it among the callbacks, found {names}")
        if getattr(trainer.datamodule, "evaluation_windows", None) is None:
            raise ValueError("RunReport needs a data module with evaluation_windows, such as TokenDataModule")
        if resumed_checkpoint(trainer) is None:
            refuse_existing_run(self.dirpath)
            self._evaluate(trainer, pl_module, "dense")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.record["stage"] != "dense":
            return  # resumed: the checkpoint brought what was measured
        if not (self.dirpath / "masks.safetensors").exists():  # OneShotPrune(save_dir=...) may have done it
            self._save(trainer, pl_module)
        elif self.tokenizer is not None and trainer.is_global_zero:
            self.tokenizer.save_pretrained(self.dirpath / "model")
        self._evaluate(trainer, pl_module, "pruned")
        self._write(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train_begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.callback_metrics.get("train_loss")
        curve = self.record["training_loss"]
        if loss is not None and (not curve or curve[-1][0] != trainer.global_step):
            curve.append([trainer.global_step, round(float(loss), 5)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record["seconds"]["recover"] = self._recover_seconds()
        self._train_begin = 0.0
        self._save(trainer, pl_module)
        self._evaluate(trainer, pl_module, "recovered")
        self._write(trainer, pl_module)
        if trainer.is_global_zero:
            summary_table(self.record)
            rank_zero_info(f"the sparse model, its masks and the report are in {self.dirpath}")

    def state_dict(self) -> dict[str, Any]:
        seconds = self.record["seconds"] | {"recover": self._recover_seconds()}
        return {"record": self.record | {"seconds": seconds}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record = state_dict["record"]

    def _recover_seconds(self) -> float:
        running = time.perf_counter() - self._train_begin if self._train_begin else 0.0
        return float(self.record["seconds"]["recover"]) + running

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        windows = trainer.datamodule.evaluation_windows
        begin = time.perf_counter()
        model = find_language_model(pl_module)
        home = next(model.parameters()).device
        model.to(trainer.strategy.root_device)  # in setup the strategy has not moved it yet
        value = perplexity(
            model, windows, batch_size=self.batch_size, progress=self.progress and trainer.is_global_zero
        )
        model.to(home)
        self.record["seconds"]["evaluate"] += time.perf_counter() - begin
        measured = {"seq_len": windows.shape[1], stage: value if math.isfinite(value) else None}
        self.record["perplexity"] |= {"dataset": getattr(trainer.datamodule, "evaluation_title", None)} | measured
        self.record["stage"] = stage
        rank_zero_info(f"{stage} perplexity {value:.2f} ({len(windows)} windows of {windows.shape[1]} tokens)")

    def _report(self, trainer: Trainer) -> PruneReport:
        report = next(callback.report for callback in trainer.callbacks if isinstance(callback, OneShotPrune))
        assert report is not None
        return report

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            model, masks = find_language_model(pl_module), self._report(trainer).masks
            save_sparse_model(model, masks, self.dirpath, self.tokenizer)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        report = self._report(trainer)
        pruner = next(callback.pruner for callback in trainer.callbacks if isinstance(callback, OneShotPrune))
        # Counted in the weights, not in the masks: without an enforcer the two part ways.
        zeros = MaskSet.from_nonzero(report.masks.matching(pl_module.named_parameters()))
        self.record["seconds"]["prune"] = report.seconds
        self.record |= {
            "pruner": repr(pruner),
            "sparsity": {
                "target": pruner.pattern.sparsity,
                "achieved": zeros.sparsity(),
                "layers": zeros.layer_sparsity(),
            },
            "violations": report.masks.violations(pl_module.named_parameters()),
            "reconstruction_loss": {layer.name: layer.relative_loss for layer in report.layers},
            "skipped": report.skipped,
            "peak_memory_bytes": max(report.peak_memory_bytes, peak_memory(trainer.strategy.root_device)),
            "versions": {name: version(name) for name in ("prune-callbacks", "torch", "lightning", "transformers")}
            | {"python": platform.python_version()},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        }
        write_json(self.dirpath / "report.json", self.record)
        draw_report(self.record, self.dirpath / "report.png")
