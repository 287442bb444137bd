"""SparsityMonitor: logs the sparsity and the violations of every layer, and draws their curves."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from prune_callbacks.callbacks.kinds import HoldsMasks, PruningCallback
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.reporting.pictures import draw_sparsity
from prune_callbacks.sparsity import MaskSet


class SparsityMonitor(PruningCallback):
    """
    Counts the zeros of every masked layer, and the pruned weights that are not zero (violations), in the weights.

    Logs `sparsity/LAYER` (a fraction) and `violations/LAYER` (a count) when training starts, after every change of the
    masks, every `every_n_steps` optimizer steps and when training ends. Draws `sparsity.png` at the end. Needs
    `MaskEnforcer`; their order does not matter.

    Args:
        dirpath: folder of the picture; None: the trainer's `default_root_dir`.
        every_n_steps: the number of optimizer steps between two counts.

    Attributes:
        history: one entry per count: `{"step", "sparsity": {layer: fraction}, "violations": {layer: count}}`.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, dirpath: str | Path | None = None, *, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"SparsityMonitor: every_n_steps must be at least 1, got {every_n_steps}")
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.history: list[dict[str, Any]] = []
        self._seen: MaskSet | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not Lineup(trainer).begins_fit(self, stage):
            return
        self.history, self._seen = [], None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        last = self.history[-1]["step"] if self.history else None
        if self._seen is None and self.history:  # resumed: were these masks counted before the checkpoint?
            masks = self._masks(trainer)
            assert masks is not None
            self._seen = masks if masks.layer_sparsity() == self.history[-1]["sparsity"] else None
        due = last is None or (trainer.global_step % self.every_n_steps == 0 and trainer.global_step != last)
        if due or self._masks(trainer) is not self._seen:
            self._count(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count(trainer)
        if trainer.is_global_zero and Lineup(trainer).trial() is None:
            draw_sparsity(self.history, Path(self.dirpath or trainer.default_root_dir) / "sparsity.png")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def _masks(self, trainer: Trainer) -> MaskSet | None:
        enforcer = Lineup(trainer).first(HoldsMasks)
        assert enforcer is not None
        return enforcer.masks

    def _count(self, trainer: Trainer) -> None:
        """Counts, appends an entry to the history and logs it; a collective of the processes."""
        self._seen = self._masks(trainer)
        assert self._seen is not None  # the enforcer has them once training has started
        weights = Lineup(trainer).weights(self._seen)
        violations, sparsity = weights.violations(), weights.layer_sparsity()
        counts = {name: violations.get(name, 0) for name in self._seen}
        self.history.append({"step": trainer.global_step, "sparsity": sparsity, "violations": counts})
        metrics: dict[str, float] = {f"sparsity/{name}": value for name, value in sparsity.items()}
        metrics |= {f"violations/{name}": count for name, count in counts.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
