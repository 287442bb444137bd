"""The report of the reconstruction of one block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_callbacks.reconstruction.settings import BlockReconstruction
from prune_callbacks.results import Result


@dataclass(frozen=True)
class BlockReport(Result):
    """
    The result of reconstructing one block.

    Attributes:
        name: the block's name.
        before: the loss after pruning, on the held-out windows (on those of the training if none are held out): the
            mean over tokens of the squared distance from the target, relative to the target's squared norm.
        after: the same loss after reconstruction.
        best_pass: the number of the pass over the windows whose parameters the block has; 0 for a block that was put
            back, because no pass made it better.
        tokens: how many tokens the training has seen, counted in every pass.
        parameters: how many values were trained, pruned ones among them.
        seconds: the wall time of its training.
    """

    name: str
    before: float
    after: float
    best_pass: int
    tokens: int
    parameters: int
    seconds: float

    @property
    def put_back(self) -> bool:
        """Returns whether the block is as it was after pruning."""
        return self.best_pass == 0


def described(blocks: Sequence[BlockReport]) -> str:
    """Returns a line on reconstructed blocks: how many, their mean loss, how many were put back."""
    before, after = (sum(getattr(b, name) for b in blocks) / max(1, len(blocks)) for name in ("before", "after"))
    back = sum(block.put_back for block in blocks)
    return f"reconstructed {len(blocks)} blocks, mean loss {before:.4g} to {after:.4g}, {back} put back"


def reconstruction_record(
    settings: BlockReconstruction, blocks: Sequence[BlockReport], untrained: Mapping[str, str]
) -> dict[str, Any]:
    """Returns what `report.json` says of a reconstruction."""
    return {
        "settings": repr(settings),
        "held_out": settings.held_out > 0,
        "seconds": sum(block.seconds for block in blocks),
        "tokens": sum(block.tokens for block in blocks),
        "put_back": [block.name for block in blocks if block.put_back],
        "blocks": [block.to_dict() for block in blocks],
        "untrained": dict(untrained),
    }
