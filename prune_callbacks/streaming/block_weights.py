"""Loads the weights of decoder blocks from a checkpoint, one block at a time, and drops them again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune_callbacks.calibration.prefetch import Ahead
from prune_callbacks.streaming.places import Place, read_weights
from prune_callbacks.streaming.skeleton import drop, fill
from prune_callbacks.streaming.source import CheckpointFolder


class BlockWeights:
    """
    The weights of the blocks of a model on the meta device.

    Args:
        checkpoint: the checkpoint.
        model: its model.
        blocks: the decoder blocks, (name, module).
        of_block: for every block, the sources of its weights by name.
        where: the device on which blocks are run.
        last: the index of the last block that is run.
    """

    def __init__(
        self,
        checkpoint: CheckpointFolder,
        model: PreTrainedModel,
        blocks: Sequence[tuple[str, nn.Module]],
        of_block: Sequence[Mapping[str, Place]],
        where: torch.device,
        last: int,
    ) -> None:
        self.checkpoint, self.model, self.blocks = checkpoint, model, blocks
        self.of_block, self.where, self.last = of_block, where, last

    def load(self, index: int, ahead: Ahead | None = None, *, move: bool = False) -> None:
        """
        Loads the weights of a block, and moves it to the device if asked to.

        On a GPU, starts to read and copy those of the next block in the background.
        """
        prefix, block = self.blocks[index]
        weights = ahead.take() if ahead is not None else None
        if weights is None:
            weights = self._read(index)
        if ahead is not None and index < self.last:
            ahead.begin(lambda: self._read(index + 1))
        fill(block, {name.removeprefix(f"{prefix}."): weight for name, weight in weights.items()})
        if move:
            block.to(self.where)

    def unload(self, index: int) -> None:
        """Drops the weights of a block and moves its computed buffers to the CPU."""
        prefix, block = self.blocks[index]
        drop(block, [name.removeprefix(f"{prefix}.") for name in self.of_block[index]])
        for module in block.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.cpu())

    def _read(self, index: int) -> dict[str, Tensor]:
        return read_weights(self.checkpoint, self.model, self.of_block[index])
