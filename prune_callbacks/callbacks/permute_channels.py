"""PermuteChannels: reorders channels when a fit begins, so that N:M keeps more."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.callbacks.calibration_batches import calibration_batches
from prune_callbacks.callbacks.lightning_internals import resumed_checkpoint
from prune_callbacks.callbacks.lineup import Lineup
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.engine.permuting import Permuted, improvement, permute_channels_
from prune_callbacks.parallel.strategies import refuse_unserved
from prune_callbacks.ranks import patient_ranks
from prune_callbacks.sparsity import NM


class PermuteChannels(Callback):
    """
    Permutes the module's language model in `setup(stage="fit")`; see `permute_channels_`. Put it before `OneShotPrune`.

    The model computes what it did, under the same names; only its channels stand in another order. A fit that resumes
    from a checkpoint does not permute again.

    Args:
        pattern: what the model is then pruned to, e.g. `NM(2, 4)`.
        batches: calibration batches, as of `OneShotPrune`.
        num_batches: how many of them to use; None: all.
        blocks: name of the list of decoder blocks, where it cannot be found.
        progress: show a progress bar.

    Attributes:
        permuted: what was done, by layer.
    """

    def __init__(
        self,
        pattern: NM,
        batches: Iterable[Any] | None = None,
        num_batches: int | None = None,
        *,
        blocks: str | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(pattern, NM):
            raise ValueError(f"PermuteChannels takes an N:M pattern such as NM(2, 4), got {pattern!r}")
        self.pattern = pattern
        self.batches = batches
        self.num_batches = num_batches
        self.blocks = blocks
        self.progress = progress
        self.permuted: dict[str, Permuted] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or resumed_checkpoint(trainer) is not None:
            return
        refuse_unserved(trainer.strategy)
        lineup = Lineup(trainer)
        one_shot = lineup.after(self).first(OneShotPrune)
        names = lineup.names(PermuteChannels, OneShotPrune)
        if one_shot is None or len(names) != 2:
            raise ValueError(f"PermuteChannels needs one OneShotPrune after it among the callbacks, found {names}")
        pruned = one_shot.pruner.pattern
        if pruned != self.pattern:
            raise ValueError(f"PermuteChannels orders channels for {self.pattern}, and OneShotPrune prunes to {pruned}")
        with isolate_rng(), patient_ranks(trainer.strategy.root_device) as ranks:
            self.permuted = permute_channels_(
                find_language_model(pl_module),
                calibration_batches(trainer, ranks, self.batches, self.num_batches),
                self.pattern,
                blocks=self.blocks,
                device=trainer.strategy.root_device,
                progress=self.progress,
                ranks=ranks,
            )
        rank_zero_info(improvement(self.permuted))
