"""Reconstructs blocks in the sequential engine, with the hidden states of the dense model in memory too."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.calibration.sources import Source
from prune_callbacks.ranks import Ranks
from prune_callbacks.reconstruction.blocks import Rebuilder, Show
from prune_callbacks.reconstruction.settings import BlockReconstruction
from prune_callbacks.reconstruction.windows import single_windows
from prune_callbacks.sparsity import MaskSet


class Rebuilding:
    """
    The hidden states of the dense model alongside those of the pruned one, and the training of blocks on both.

    Args:
        model: the model.
        settings: the settings.
        order: the owners of all windows; see `Windows`.
        source: the inputs of the first block.
        ranks: the processes.

    Attributes:
        rebuilder: the results.

    Raises:
        ValueError: the blocks form no chain.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: BlockReconstruction,
        order: Sequence[tuple[int, int]],
        source: Source,
        ranks: Ranks,
    ) -> None:
        self.rebuilder = Rebuilder(model, settings, order, ranks)
        self._pruned = source.chain("reconstruction")
        self._dense = self._pruned.copy()

    def note_dense(self, index: int, block: nn.Module, where: torch.device) -> None:
        """Runs a block that is still dense on the dense model's hidden states; call it before pruning the block."""
        self._dense.advance(index, block, where)

    def train(
        self, index: int, name: str, block: nn.Module, where: torch.device, masks: Iterable[MaskSet], show: Show
    ) -> None:
        """Trains a pruned block, given its masks, if it has any; see `Rebuilder.reconstruct`."""
        own = MaskSet.join(masks)
        if own:
            inputs, goals = self._pruned.inputs, self._dense.inputs
            self.rebuilder.reconstruct(index, name, block, inputs, goals, own, where, show)


def cut(
    batches: Iterable[Any] | None, reconstruction: BlockReconstruction | None, ranks: Ranks
) -> tuple[Any, list[tuple[int, int]]]:
    """
    Returns the batches, cut into single windows if there is a reconstruction, and the order of these; see `Windows`.

    Raises:
        ValueError: as `single_windows`.
    """
    # One tensor in place of several batches is refused later, with the other checks of batches.
    if reconstruction is None or batches is None or isinstance(batches, Tensor):
        return batches, []
    return single_windows(batches, reconstruction, ranks)
