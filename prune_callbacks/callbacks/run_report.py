"""RunReport: measures a run before and after pruning, round by round and after recovery, and writes its folder."""

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from transformers import PreTrainedTokenizerBase

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.calibration.described import count_tokens
from prune_callbacks.callbacks.iterative_prune import IterativePrune
from prune_callbacks.callbacks.kinds import FinishesWeights, PruningCallback
from prune_callbacks.callbacks.lightning_internals import resumed_checkpoint
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.callbacks.page_on_time import PageOnTime
from prune_callbacks.callbacks.run_outcome import masks_in_force, note_costs, outcome
from prune_callbacks.callbacks.run_quality import RunQuality
from prune_callbacks.callbacks.save_model import Save, save_model, save_unless_there
from prune_callbacks.callbacks.training_clock import TrainingClock
from prune_callbacks.measure.zero_shot import ZeroShot
from prune_callbacks.parallel.strategies import world
from prune_callbacks.recorded_warnings import RecordedWarnings
from prune_callbacks.reporting.summary import summary_table
from prune_callbacks.sparsity.schedules import Unit
from prune_callbacks.storage.commands import repeat_command
from prune_callbacks.storage.run_record import RunRecord, Seconds, refuse_existing_run, resumed_record
from prune_callbacks.writing import write_json


class RunReport(PruningCallback):
    """
    Writes `report.html`, `report.json`, `report.png`, `masks.safetensors` and `model/` into one folder.

    Put it **before** `OneShotPrune` and `IterativePrune`, because it measures the model before they prune it. The
    one-shot pruned model and its masks are saved before the first training step (with `OneShotPrune(dirpath=...)` right
    after pruning), and the recovered model when the fit ends.

    Perplexity is measured on the data module's `evaluation_windows`, (windows, tokens) of token ids, and reported
    under its `evaluation_title`, with its `text_setting` if it has one, and texts in its `further_evaluation` by name.
    Without such windows the quality is what the module logs in its own validation, as `Trainer.validate` would give it,
    measured aside from training. With `IterativePrune` "dense" is the model before the first change and "pruned" the
    model right after the last change (and its rewinding); `rounds` has the trained model before every change.
    `zero_shot` adds the accuracy of the three models on tasks, in fits of one process.

    A trial run (`Tuner`, `fast_dev_run`, `overfit_batches`) is neither measured nor written.

    `report.json` is written after every stage and round. The page and the picture are drawn at the end of the fit, and
    at most every 30 seconds during training; `prune_callbacks.reporting.page.write_page` draws the page again.

    Args:
        dirpath: the run's folder. A folder that holds a run is refused, unless the fit resumes from a checkpoint.
        recipe: name of the recipe, for the report.
        model: name of the model, for the report.
        tokenizer: saved alongside the model.
        batch_size: evaluation windows per forward pass.
        zero_shot: tasks to measure accuracy on; needs the tokenizer.
        every_round: measure quality before every change of `IterativePrune`; False: before the first only.
        progress: show progress bars.
        validation: measure what the module logs in its validation; None: where there are no `evaluation_windows`.

    Attributes:
        run: the record of the run.
    """

    def __init__(
        self,
        dirpath: str | Path,
        *,
        recipe: str | None = None,
        model: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 1,
        zero_shot: ZeroShot | None = None,
        every_round: bool = True,
        progress: bool = True,
        validation: bool | None = None,
    ) -> None:
        if zero_shot is not None and tokenizer is None:
            raise ValueError("RunReport needs a tokenizer to measure zero-shot accuracy: pass tokenizer=")
        self.dirpath = Path(dirpath)
        self.tokenizer = tokenizer
        self.zero_shot = zero_shot
        self.every_round = every_round
        self._quality = RunQuality(tokenizer, batch_size, zero_shot, progress, validation)
        self._warnings = RecordedWarnings(but=PossibleUserWarning)
        self.run = RunRecord(
            recipe=recipe,
            model=model,
            command=repeat_command(sys.argv),
            stage="dense",
            seconds=Seconds(None, 0.0, 0.0),
            warnings=self._warnings.texts,
        )
        self._clock = TrainingClock()
        self._page = PageOnTime(self.dirpath)
        self._saw_the_last = self._finished = False
        self._one_shot: OneShotPrune | None = None
        self._iterative: IterativePrune | None = None

    @property
    def record(self) -> dict[str, Any]:
        """Returns the record as `report.json` holds it."""
        return self.run.to_json()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lineup = Lineup(trainer)
        if not lineup.begins_fit(self, stage):
            return
        self._finished = lineup.trial() is not None
        self._quality.check(trainer, pl_module)
        if self._finished:  # nothing of a trial run is measured or written
            self._one_shot = self._iterative = None
            return
        self._warnings.start()
        self._one_shot, self._iterative = lineup.first(OneShotPrune), lineup.first(IterativePrune)
        if resumed_checkpoint(trainer) is None:
            # Only rank 0 looks: other ranks could see files that rank 0 has just written.
            world(trainer).first(lambda: refuse_existing_run(self.dirpath))
            if self._one_shot is not None:
                with self._clock.evaluating(self.run.seconds):
                    self._quality.dense(trainer, pl_module, self.dirpath, self.run)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._one_shot is None or resumed_checkpoint(trainer) is not None:
            return  # a checkpoint has the measurements; some strategies load it later
        if self._one_shot.files is None:  # else the pruned model is in these files
            self._save(trainer, pl_module, save_unless_there)
        self._evaluate(trainer, pl_module, "pruned")
        self._write(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.start()
        if trainer.is_global_zero and self.run.pruner is not None:
            self._page.changed = True  # in a resumed fit too
        if trainer.ckpt_path is None and self._iterative is not None:
            self._before_a_change(trainer, pl_module, self._iterative.schedule.unit, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before_a_change(trainer, pl_module, "epoch", trainer.current_epoch)  # where IterativePrune catches up
        prune = self._iterative
        if prune is not None and prune.round == len(prune.schedule.changes) and not self._saw_the_last:
            self._saw_the_last = True
            self._evaluate(trainer, pl_module, "pruned")
            self._write(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._finished:
            return
        self.run.add_batch(count_tokens(batch) * trainer.world_size)
        loss = trainer.callback_metrics.get("train_loss")
        if loss is not None:
            self.run.add_loss(trainer.global_step, float(loss))
        self._before_a_change(trainer, pl_module, "step", trainer.global_step)
        if self._page.is_due():
            with self._clock.evaluating(self.run.seconds):
                self._page.draw(self.run)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_a_change(trainer, pl_module, "epoch", trainer.current_epoch + 1)

    def _before_a_change(self, trainer: Trainer, pl_module: LightningModule, unit: Unit, now: int) -> None:
        prune = self._iterative
        if prune is None or not prune.rises(unit, now):
            return
        self.run.changes.append(trainer.global_step)
        if not self.run.measured("dense"):
            self._round(trainer, self._evaluate(trainer, pl_module, "dense"))
        elif self.every_round:
            with self._clock.evaluating(self.run.seconds):
                quality = self._quality.at_round(trainer, pl_module)
            self._round(trainer, quality)
            self._write(trainer, pl_module)

    def _round(self, trainer: Trainer, quality: dict[str, Any]) -> None:
        assert self._iterative is not None
        assert self._iterative.masks is not None
        sparsity = self._iterative.masks.sparsity()
        self.run.rounds.append({"step": trainer.global_step, "sparsity": sparsity} | quality)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module)  # while the strategy still has the weights

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module)  # a fit resumed at its last step has no on_train_end

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._finished:
            return
        self._finished = True
        for callback in Lineup(trainer).all(FinishesWeights):
            callback.finish(trainer)  # they come after RunReport in the list
        self._clock.stop(self.run.seconds)
        again = self.run.stage == "recovered"  # resumed from a checkpoint of the end
        self._save(trainer, pl_module)
        quality = self._evaluate(trainer, pl_module, "recovered")
        if self._iterative is not None and not again:
            self._round(trainer, quality)
        self._write(trainer, pl_module)
        self._page.draw(self.run)
        if trainer.is_global_zero:
            summary_table(self.run)
            rank_zero_info(f"the sparse model, its masks and the report are in {self.dirpath}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._warnings.stop()  # Lightning calls no teardown after an error
        with suppress(Exception):  # the one that is on its way says more
            self._page.draw(self.run)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._warnings.stop()

    def state_dict(self) -> dict[str, Any]:
        record = self.record
        record["seconds"]["recover"] = self._clock.trained(self.run.seconds)
        return {"record": record, "saw_the_last": self._saw_the_last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        resumed = resumed_record(state_dict["record"], self.run.recipe)
        self._warnings.put_before(state_dict["record"]["warnings"])
        self.run = replace(resumed, warnings=self._warnings.texts)
        self._saw_the_last = state_dict["saw_the_last"]

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Any]:
        with self._clock.evaluating(self.run.seconds):
            quality = self._quality.measure(trainer, pl_module, stage, self.run)
        self.run.stage = stage
        return quality

    def _save(self, trainer: Trainer, pl_module: LightningModule, save: Save = save_model) -> None:
        model, masks = find_language_model(pl_module), masks_in_force(self._one_shot, self._iterative)
        save(trainer, model, masks, self.dirpath, self.tokenizer)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        further = () if self.zero_shot is None else ("lm_eval",)
        found = outcome(trainer, self._one_shot, self._iterative, self.dirpath, further)
        if not trainer.is_global_zero:
            return
        self.run = replace(self.run, **found)
        note_costs(trainer, self.run, self._one_shot, self._iterative)
        write_json(self.dirpath / "report.json", self.record)
        self._page.changed = True
