"""QuantizeWeights: rounds the sparse model when a fit ends, and writes it compressed, without its zeros."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.anatomy.targets import find_targets
from prune_callbacks.callbacks.calibration_batches import calibration_batches
from prune_callbacks.callbacks.kinds import PrunesOnce, PruningCallback
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.lora_recovery import LoRARecovery
from prune_callbacks.callbacks.model_in_setup import model_in_setup
from prune_callbacks.deploy.compression import save_compressed
from prune_callbacks.deploy.compression_size import Compression
from prune_callbacks.engine.report import PruneReport
from prune_callbacks.engine.sequential import prune_sequentially
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.parallel.strategies import world
from prune_callbacks.pruners import GPTQ
from prune_callbacks.ranks import patient_ranks
from prune_callbacks.solvers.gptq import Grid
from prune_callbacks.storage.model_folder import savable
from prune_callbacks.writing import write_json


class QuantizeWeights(PruningCallback):
    """
    Rounds the weights of the module's language model at the end of the fit by `GPTQ`; zeros stay zero.

    Put it last, after `RunReport`, which saves the model before rounding. Afterwards the module has the rounded
    weights, dense with zeros, in its own dtype. `dirpath/compressed` has the same weights as codes; see
    `save_compressed`. `dirpath/compression.json` has the bytes of every part and the perplexity before and after.

    Args:
        dirpath: the run's folder.
        grid: the grid that weights are rounded to.
        batches: calibration batches; see `OneShotPrune`.
        num_batches: how many batches to use; see `OneShotPrune`.
        targets: patterns of layer names; None for all linear layers of the decoder blocks.
        blocks: name of the list of decoder blocks, where it cannot be found.
        tokenizer: saved alongside the compressed model.
        batch_size: evaluation windows per forward pass.
        progress: show progress bars.

    Attributes:
        rounding: the `PruneReport` of rounding, with the scales.
        compression: the bytes of the compressed file, part by part.
        perplexity: (before, after) rounding; None if the data module has no `evaluation_windows`.
    """

    needs_whole_weights = True

    def __init__(
        self,
        dirpath: str | Path,
        grid: Grid = Grid(),
        *,
        batches: Iterable[Any] | None = None,
        num_batches: int | None = None,
        targets: Sequence[str] | str | None = None,
        blocks: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 1,
        progress: bool = True,
    ) -> None:
        self.dirpath = Path(dirpath)
        self.pruner = GPTQ(grid=grid)
        self.batches = batches
        self.num_batches = num_batches
        self.targets = targets
        self.blocks = blocks
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.progress = progress
        self.rounding: PruneReport | None = None
        self.compression: Compression | None = None
        self._inputs: list[Any] = []
        self.perplexity: tuple[float, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not Lineup(trainer).begins_fit(self, stage):
            return
        self._check_adapters(trainer)
        self.rounding = self.compression = self.perplexity = None
        model = model_in_setup("QuantizeWeights", pl_module, self.blocks)
        savable(model)
        find_targets(find_blocks(model, self.blocks), self.targets)  # reports wrong names now, not after training
        with isolate_rng(), patient_ranks(trainer.strategy.root_device) as ranks:
            self._inputs = calibration_batches(trainer, ranks, model, self.batches, self.num_batches)

    @staticmethod
    def _check_adapters(trainer: Trainer) -> None:
        """Raises ValueError for a LoRARecovery that does not merge its update."""
        if any(not callback.masked for callback in Lineup(trainer).all(LoRARecovery)):
            raise ValueError(
                "QuantizeWeights rounds whole weights, and LoRARecovery(masked=False) keeps its adapter apart; "
                "use masked=True, which merges it"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if Lineup(trainer).trial() is not None:
            return
        pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        model = find_language_model(pl_module)
        before = self._measure(trainer, pl_module)
        with patient_ranks(trainer.strategy.root_device) as ranks:
            self.rounding = prune_sequentially(
                model,
                self._inputs,
                self.pruner,
                targets=self.targets,
                blocks=self.blocks,
                device=trainer.strategy.root_device,
                progress=self.progress,
                ranks=ranks,
            )
        after = self._measure(trainer, pl_module)
        self.perplexity = None if before is None or after is None else (before, after)
        pl_module.cpu()
        if trainer.is_global_zero:
            self._write(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Returns the perplexity on the evaluation windows; None without windows."""
        windows = getattr(trainer.datamodule, "evaluation_windows", None)
        if windows is None:
            return None
        show = self.progress and trainer.is_global_zero
        model = find_language_model(pl_module)
        return perplexity(model, windows, batch_size=self.batch_size, progress=show, ranks=world(trainer))

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `compressed/` and `compression.json`."""
        assert self.rounding is not None
        one_shot = Lineup(trainer).first(PrunesOnce)
        self.compression = save_compressed(
            find_language_model(pl_module),
            self.rounding.masks,
            self.dirpath / "compressed",
            pattern=None if one_shot is None else one_shot.pruner.pattern,
            scales=self.rounding.scales,
            grid=self.pruner.grid,
            tokenizer=self.tokenizer,
        )
        windows = getattr(trainer.datamodule, "evaluation_windows", None)
        record: dict[str, Any] = {"grid": repr(self.pruner.grid)} | self.compression.to_dict()
        if self.perplexity is not None and windows is not None:
            record["perplexity"] = {
                "dataset": getattr(trainer.datamodule, "evaluation_title", None),
                "seq_len": windows.shape[1],
                "before": self.perplexity[0],
                "after": self.perplexity[1],
            }
            rank_zero_info(
                f"perplexity {self.perplexity[0]:.2f} before rounding, {self.perplexity[1]:.2f} after "
                f"({len(windows)} windows of {windows.shape[1]} tokens)"
            )
        write_json(self.dirpath / "compression.json", record)
        rank_zero_info(f"{self.compression}; in {self.dirpath / 'compressed'}")
