"""MeasuredAllocation: spreads sparsity by what pruning each block costs, measured right before pruning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from prune_callbacks.allocation.lagrangian import LagrangianAllocation, importance_of
from prune_callbacks.allocation.protocol import Allocation, Values
from prune_callbacks.calibration.batches import Batch
from prune_callbacks.calibration.texts import language_model, moved, texts_of
from prune_callbacks.pruners import Pruner, Wanda
from prune_callbacks.ranks import Ranks
from prune_callbacks.solvers import Gram
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.studies.sensitivity import sensitivity


@dataclass(frozen=True)
class MeasuredAllocation:
    """
    An allocation of least measured cost: `LagrangianAllocation`, weighted by what pruning every block costs this model.

    Before pruning, one block at a time is pruned by `Wanda` in the dense model, and the perplexity on a few of the
    calibration windows is measured; no further text decides anything. The losses of layers at other sparsities are
    Wanda's too, which is cheap, whatever pruner then prunes. Equivalent to `sensitivity(unit="block", path=...)` with
    Wanda and `LagrangianAllocation.from_file(path)`, in one step.

    Needs a causal LM of `transformers` and calibration batches of token ids. The whole model, and the hidden states of
    all windows, are on the device of the pruning while it is measured. Over ranks, the first one measures, on the
    batches of all.

    Args:
        reach: the largest distance of a layer's sparsity from the target.
        points: the number of sparsities on either side of the target at which losses are measured.
        windows: on how many calibration windows perplexity is measured: the longest, cut to one length.

    Raises:
        ValueError: `windows` is no whole number of at least 1, or as of `LagrangianAllocation`. When it measures: the
            model is no causal LM, the batches hold no token ids, or no block is sensitive.
    """

    reach: float = 0.15
    points: int = 3
    windows: int = 4

    def __post_init__(self) -> None:
        self._weighted({})  # which checks the other two
        if not isinstance(self.windows, int) or self.windows < 1:
            raise ValueError(f"MeasuredAllocation: windows must be a whole number of at least 1, got {self.windows!r}")

    def prepared(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        pruner: Pruner,
        *,
        targets: Sequence[str] | str | None,
        blocks: str | Sequence[str] | None,
        device: torch.device | None,
        progress: bool,
        ranks: Ranks,
    ) -> Allocation:
        """Returns the allocation with the importance of every block, measured on the first rank; a collective."""
        own = ranks.attempt(lambda: self._texts(model, batches, blocks))
        given = [batch for turn in zip_longest(*ranks.gather(list(batches))) for batch in turn if batch is not None]
        texts = [t for turn in zip_longest(*ranks.gather(own), fillvalue=()) for texts in turn for t in texts]

        def measure() -> dict[str, float]:
            chosen = sorted(texts, key=len, reverse=True)[: self.windows]  # of equal lengths the first
            length = min(map(len, chosen), default=0)
            if length < 2:
                raise ValueError("MeasuredAllocation measures perplexity, and there is no window of two tokens or more")
            windows = torch.stack([text[:length] for text in chosen])
            setting: dict[str, Any] = {"unit": "block", "targets": targets, "blocks": blocks, "progress": progress}
            with moved(model, device):
                found = sensitivity(model, given, windows, Wanda(pruner.pattern), **setting)
            return importance_of(found.increase, found.proxy, "MeasuredAllocation: the model")

        return self._weighted(ranks.first(measure))

    def _texts(
        self, model: nn.Module, batches: Sequence[Batch], blocks: str | Sequence[str] | None
    ) -> list[list[Tensor]]:
        """Returns the windows of every batch; raises ValueError for a model or blocks that cannot be measured."""
        if language_model("MeasuredAllocation", model) is not model:
            raise ValueError(
                f"MeasuredAllocation measures a causal LM, and {type(model).__name__} holds one: prune the inner one"
            )
        if not isinstance(blocks, str | None):
            raise ValueError(f"MeasuredAllocation measures one list of blocks, got {list(blocks)}")
        return [texts_of("MeasuredAllocation", model, batch) for batch in batches]

    def _weighted(self, importance: Mapping[str, float]) -> "_ByWanda":
        return _ByWanda(self.reach, self.points, importance)

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError for a pattern other than `Unstructured` and `NM`."""
        self._weighted({}).check(pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """Returns an empty Gram, from which losses are computed."""
        return Gram(in_features, device)

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        """Raises TypeError: what `prepared` returns measures layers."""
        raise TypeError("MeasuredAllocation measures the whole model first: use what its method prepared returns")

    def choose(self, values: Values, shapes: Mapping[str, tuple[int, int]], pattern: Pattern) -> dict[str, Pattern]:
        """Raises TypeError: what `prepared` returns chooses."""
        raise TypeError("MeasuredAllocation measures the whole model first: use what its method prepared returns")


@dataclass(frozen=True)
class _ByWanda(LagrangianAllocation):
    """A `LagrangianAllocation` whose losses are Wanda's, whatever pruner prunes."""

    def measure(
        self, pruner: Pruner, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistic]
    ) -> dict[str, Any]:
        return super().measure(Wanda(pruner.pattern), weights, statistics)
