"""Reconstructs the blocks of a model one after another, and gathers the reports."""

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from prune_callbacks.anatomy.names import dotted, naming
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.ranks import Ranks
from prune_callbacks.reconstruction.parameters import held_back, masks_of_block
from prune_callbacks.reconstruction.report import BlockReport
from prune_callbacks.reconstruction.settings import BlockReconstruction
from prune_callbacks.reconstruction.training import BlockLoss, train_block
from prune_callbacks.sparsity import MaskSet

Show = Callable[[str], None]


class Rebuilder:
    """
    Reconstructs block after block, and gathers the results.

    Args:
        model: the model of the blocks.
        settings: the settings.
        order: the owners of all windows; see `Windows`.
        ranks: the processes, each with its own windows.
        frozen: whether parameters with `requires_grad=False` stay as they are.

    Attributes:
        reports: one entry per reconstructed block.
        left: the reason for every parameter of these blocks that was not trained, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: BlockReconstruction,
        order: Sequence[tuple[int, int]],
        ranks: Ranks,
        *,
        frozen: bool = True,
    ) -> None:
        self._model, self._settings, self._order = model, settings, order
        self._ranks, self._frozen = ranks, frozen
        self.reports: list[BlockReport] = []
        self.left: dict[str, str] = {}

    def reconstruct(
        self,
        index: int,
        name: str,
        block: nn.Module,
        inputs: Sequence[BlockInputs],
        goals: Sequence[BlockInputs],
        masks: MaskSet,
        where: torch.device,
        show: Show,
    ) -> None:
        """
        Trains a pruned block in place; a collective of the ranks.

        Args:
            index: the index of the block.
            name: its name in the model.
            block: the block, on `where`.
            inputs: its inputs in the pruned model, one window each.
            goals: the same windows, with the outputs of the dense model's block in place of the hidden states.
            masks: the masks of the model, or of this block; pruned weights must be zeros.
            where: the device.
            show: called with a line on the progress.

        Raises:
            ValueError: the outputs of the block are not finite; names the block.
        """
        begin = time.perf_counter()
        if not any(self._ranks.gather(any(piece.calls[index] is not None for piece in inputs))):
            if self._ranks.rank == 0:
                warnings.warn(f"{name} is not reconstructed: the model never calls it", stacklevel=3)
            return
        left = held_back(self._model, name, block, frozen=self._frozen)
        trained = {path: value for path, value in block.named_parameters() if dotted(name, path) not in left}
        own = masks_of_block(masks, name, trained)
        if self._settings.trained == "weights":
            trained = {path: trained[path] for path in own}
        self.left |= left
        if not own and masks_of_block(masks, name, [path for path, _ in block.named_parameters()]):
            first = next(iter(left))
            warnings.warn(
                f"{name} is not reconstructed, since none of its pruned weights can be trained; first {first}: "
                f"{left[first]}",
                stacklevel=3,
            )
        if not own:
            return
        loss = BlockLoss(index, block, inputs, goals, self._order, where, self._ranks)
        told = f"reconstructing {name}"
        with naming(name):
            done = train_block(
                block,
                loss,
                trained,
                own,
                self._settings,
                len(self._order),
                self._settings.seed + index,
                lambda number, first, lowest: show(f"{told}, pass {number}: {first:.4g} -> {lowest:.4g}"),
            )
        size = sum(parameter.numel() for parameter in trained.values())
        self.reports.append(BlockReport(name, *done, size, time.perf_counter() - begin))
