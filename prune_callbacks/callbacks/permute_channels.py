"""PermuteChannels: reorders channels when a fit begins, so that N:M keeps a larger score."""

import time
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from prune_callbacks.callbacks.calibration_batches import calibration_batches
from prune_callbacks.callbacks.kinds import PrunesOnce, PruningCallback
from prune_callbacks.callbacks.lightning_internals import resumed_checkpoint
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.model_in_setup import model_in_setup
from prune_callbacks.engine.permuting import Permuted, improvement, permute_channels_
from prune_callbacks.ranks import patient_ranks
from prune_callbacks.sparsity import NM
from prune_callbacks.sparsity.questions import kept_of_group


class PermuteChannels(PruningCallback):
    """
    Permutes the module's language model in `setup(stage="fit")`; see `permute_channels_`. Put it before `OneShotPrune`.

    The outputs of the model and the names of its parameters stay the same. A fit that resumes from a checkpoint does
    not permute again.

    Args:
        pattern: the pattern of `OneShotPrune`, e.g. `NM(2, 4)`.
        batches: calibration batches; see `OneShotPrune`.
        num_batches: how many batches to use; see `OneShotPrune`.
        blocks: name of the list of decoder blocks, where it cannot be found.
        progress: show a progress bar.

    Attributes:
        permuted: the gain of every permuted layer, by name.
        seconds: the wall time of permuting.

    Raises:
        ValueError: the pattern is not N:M.
    """

    def __init__(
        self,
        pattern: NM,
        batches: Iterable[Any] | None = None,
        *,
        num_batches: int | None = None,
        blocks: str | None = None,
        progress: bool = True,
    ) -> None:
        if kept_of_group(pattern) is None:
            raise ValueError(f"PermuteChannels takes an N:M pattern such as NM(2, 4), got {pattern!r}")
        self.pattern = pattern
        self.batches = batches
        self.num_batches = num_batches
        self.blocks = blocks
        self.progress = progress
        self.permuted: dict[str, Permuted] = {}
        self.seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lineup = Lineup(trainer)
        if not lineup.begins_fit(self, stage) or resumed_checkpoint(trainer) is not None:
            return
        one_shot = lineup.first(PrunesOnce)
        assert one_shot is not None
        pruned = one_shot.pruner.pattern
        if pruned != self.pattern:
            raise ValueError(f"PermuteChannels orders channels for {self.pattern}, and OneShotPrune prunes to {pruned}")
        model = model_in_setup("PermuteChannels", pl_module, self.blocks)
        begin = time.perf_counter()
        with isolate_rng(), patient_ranks(trainer.strategy.root_device) as ranks:
            self.permuted = permute_channels_(
                model,
                calibration_batches(trainer, ranks, model, self.batches, self.num_batches),
                self.pattern,
                blocks=self.blocks,
                device=trainer.strategy.root_device,
                progress=self.progress,
                ranks=ranks,
            )
        self.seconds = time.perf_counter() - begin
        rank_zero_info(improvement(self.permuted))
