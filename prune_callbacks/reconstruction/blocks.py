"""Reconstructs the blocks of a model one after another, and gathers the reports."""

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from prune_callbacks.anatomy.names import dotted, naming
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.ranks import Ranks
from prune_callbacks.reconstruction.loss import BlockLoss
from prune_callbacks.reconstruction.parameters import ALL_PRUNED, NOT_PRUNED, masks_of_block, not_trained
from prune_callbacks.reconstruction.report import BlockReport
from prune_callbacks.reconstruction.settings import BlockReconstruction
from prune_callbacks.reconstruction.training import train_block
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
        masked = masks_of_block(masks, name, [path for path, _ in block.named_parameters()])
        if not masked or not self._called(index, name, inputs):
            return
        left = not_trained(self._model, name, block, frozen=self._frozen)
        if self._settings.trained == "weights":
            others = [path for path, _ in block.named_parameters() if path not in masked]
            left = {dotted(name, path): NOT_PRUNED for path in others} | left
        left = {dotted(name, path): ALL_PRUNED for path in masked if not bool(masked[path].any())} | left
        trained = {path: value for path, value in block.named_parameters() if dotted(name, path) not in left}
        self.left |= left
        if not trained.keys() & masked.keys():
            first = dotted(name, next(iter(masked)))
            self._warn(
                f"{name} is not reconstructed: none of its pruned weights can be trained; {first}: {left[first]}"
            )
            return
        loss = BlockLoss(index, block, inputs, goals, self._order, where, self._ranks)
        with naming(name):
            done = train_block(
                block,
                loss,
                trained,
                MaskSet({path: masked[path] for path in masked if path in trained}),
                self._settings,
                self._settings.seed + index,
                lambda number, first, lowest: show(
                    f"reconstructing {name}, pass {number}: {first:.4g} -> {lowest:.4g}"
                ),
            )
        size = sum(parameter.numel() for parameter in trained.values())
        self.reports.append(BlockReport(name, *done, size, time.perf_counter() - begin))

    def finish(self) -> None:
        """Warns if every block was put back."""
        if self.reports and all(report.put_back for report in self.reports):
            self._warn(
                f"reconstruction made none of {len(self.reports)} blocks better on the windows that decide, so all are "
                "as pruning left them. Give more calibration windows, or a lower learning_rate"
            )

    def _called(self, index: int, name: str, inputs: Sequence[BlockInputs]) -> bool:
        """Returns whether the model calls a block on any rank; warns if it does not."""
        called = any(self._ranks.gather(any(window.calls[index] is not None for window in inputs)))
        if not called:
            self._warn(f"{name} is not reconstructed: the model never calls it")
        return called

    def _warn(self, text: str) -> None:
        if self._ranks.rank == 0:
            warnings.warn(text, stacklevel=4)
