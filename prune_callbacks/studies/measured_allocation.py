"""MeasuredAllocation: spreads sparsity by what pruning each block costs, measured right before pruning."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.allocation.lagrangian import LagrangianAllocation, importance_of
from prune_callbacks.calibration.batches import Batch, named_inputs
from prune_callbacks.calibration.texts import language_model, moved, texts_of
from prune_callbacks.pruners import Pruner, Wanda
from prune_callbacks.ranks import Ranks
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.studies.sensitivity import sensitivity


@dataclass(frozen=True)
class MeasuredAllocation(LagrangianAllocation):
    """
    An allocation of least measured cost: `LagrangianAllocation`, weighted by what pruning every block costs this model.

    Before pruning, one block at a time is pruned by `Wanda` in the dense model, and the perplexity on a few of the
    calibration windows is measured; no further text decides anything. The losses of layers at other sparsities are
    Wanda's too, which is cheap, whatever pruner then prunes. Equivalent to `sensitivity(unit="block", path=...)` and
    `LagrangianAllocation.from_file(path)`, in one step.

    Needs a causal LM of `transformers` and calibration batches of token ids. The whole model moves to the device that
    blocks run on while it is measured. Over ranks, the first one measures, on its own batches.

    Args:
        windows: on how many calibration windows perplexity is measured.
        reach: the largest distance of a layer's sparsity from the target.
        points: the number of sparsities on either side of the target at which losses are measured.

    Raises:
        ValueError: `windows` is below 1, or as of `LagrangianAllocation`. When it measures: the model is no causal LM,
            the batches hold no token ids, or no block is sensitive.
    """

    windows: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows < 1:
            raise ValueError(f"MeasuredAllocation: windows must be at least 1, got {self.windows}")

    def prepared(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        pruner: Pruner,
        *,
        targets: Sequence[str] | str | None,
        blocks: str | Sequence[str] | None,
        device: torch.device | None,
        progress: bool,
        ranks: Ranks,
    ) -> "MeasuredAllocation":
        """Returns the allocation with the importance of every block, measured on the first rank; a collective."""
        whole = ranks.attempt(lambda: language_model("MeasuredAllocation", model))

        def measure() -> dict[str, float]:
            given = [named_inputs(batch) for batch in batches]
            texts = [text for batch in given for text in texts_of("MeasuredAllocation", whole, batch)]
            longest = max(map(len, texts), default=0)
            if longest < 2:
                raise ValueError("MeasuredAllocation measures perplexity, and there is no window of two tokens or more")
            windows = torch.stack([text for text in texts if len(text) == longest][: self.windows])
            setting = {"unit": "block", "targets": targets, "blocks": blocks, "progress": progress}
            with moved(whole, device):
                found = sensitivity(whole, given, windows, Wanda(pruner.pattern), **setting)  # type: ignore[arg-type]
            return importance_of(found.increase, found.proxy, "MeasuredAllocation: the model")

        importance = ranks.share(ranks.attempt(lambda: measure() if ranks.rank == 0 else None))
        assert importance is not None
        return replace(self, importance=importance)

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """Measures the curve of every layer with Wanda: (sparsity, relative loss) at every point."""
        return super().measure(Wanda(pruner.pattern), weights, statistics)
