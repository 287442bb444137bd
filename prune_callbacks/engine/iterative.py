"""Choosing which of the weights that are left go next, over all layers or layer by layer."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from prune_callbacks.anatomy.blocks import naming
from prune_callbacks.pruners import Magnitude
from prune_callbacks.ranks import Ranks
from prune_callbacks.sparsity import NM, MaskSet, Pattern, Unstructured, keep_largest_of_all

Scope = Literal["global", "layer"]


@runtime_checkable
class SharedWeights(Protocol):
    """Masked weights that are spread over ranks; `prune_callbacks.parallel.ParamAccess` says what the methods do."""

    masks: MaskSet
    ranks: Ranks

    def own(self, name: str) -> Tensor: ...

    def own_keep(self, name: str) -> Tensor: ...

    def joined(self, own: Iterable[tuple[str, Tensor]]) -> MaskSet: ...

    def read(self, name: str) -> Tensor: ...


@torch.no_grad()
def shrink_masks(
    weights: SharedWeights,
    names: Collection[str],
    sparsity: float,
    pruner: Magnitude,
    scope: Scope,
    input_first: Collection[str] = (),
) -> MaskSet:
    """
    The masks of a higher sparsity: what is removed stays removed, the survivors of lowest score go.

    Equivalent to pruning the masked weights, what is already removed going first. The count is exact:
    `round(sparsity * weights)` removed over all layers (global), or by the pattern in every layer. The model is never
    gathered: the global threshold comes from histograms, and of a layer's structure one layer at a time is whole.

    Args:
        weights: the weights, and the masks in force. Every rank gets the same result.
        names: the masked parameters to choose from.
        sparsity: fraction of their weights that is removed in the end.
        pruner: gives the scores, and the pattern for `scope="layer"`; the sparsity of its pattern is not used.
        scope: "global": one pool of all layers. "layer": the same sparsity in every layer.
        input_first: names of weights stored as (in, out), those of GPT-2's `Conv1D`; of experts (experts, in, out).
    """
    if scope == "global":
        total = sum(torch.Size(weights.masks.shape(name)).numel() for name in names)
        kept = total - round(sparsity * total)
        chosen = weights.joined(keep_largest_of_all(_OwnScores(weights, names, pruner), kept, weights.ranks))
    else:
        pattern = replace(pruner.pattern, sparsity=sparsity)  # type: ignore[type-var]
        chosen = MaskSet.join(
            MaskSet({name: _keep_in_layer(weights, name, pruner, pattern, name in input_first)}) for name in names
        )
    return weights.masks & chosen


def _keep_in_layer(weights: SharedWeights, name: str, pruner: Magnitude, pattern: Pattern, input_first: bool) -> Tensor:
    # In the sum over a structure what is gone has zero; of single weights it goes below survivors that happen to be so.
    lowest = -torch.inf if isinstance(pattern, Unstructured) else 0.0
    weight = weights.read(name)

    def choose() -> Tensor:
        removed = ~weights.masks[name].to(weight.device)
        scores = pruner.scores(weight).masked_fill(removed, lowest)
        return _keep_in_each(pattern, scores.mT).mT.cpu() if input_first else _keep_in_each(pattern, scores).cpu()

    with naming(name):
        return weights.ranks.share(weights.ranks.attempt(choose))


def _keep_in_each(pattern: Pattern, scores: Tensor) -> Tensor:
    """The mask of a layer; of several experts in one tensor, (experts, out, in), each by itself."""
    if scores.ndim == 3:
        return torch.stack([pattern.keep(matrix) for matrix in scores])
    return pattern.keep(scores)


@dataclass(frozen=True)
class _OwnScores(Mapping[str, Tensor]):
    """The scores of this rank's parts, made when asked for, so never all at once; of what is gone, minus infinity."""

    weights: SharedWeights
    names: Collection[str]
    pruner: Magnitude

    def __getitem__(self, name: str) -> Tensor:
        return self.pruner.scores(self.weights.own(name)).masked_fill(~self.weights.own_keep(name), -torch.inf)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def check_shrinkable(pruner: Magnitude, scope: str, target: float) -> None:
    """Raises ValueError unless the pruner can follow a schedule to `target` in this scope."""
    if not isinstance(pruner, Magnitude):
        raise ValueError(
            f"IterativePrune chooses among the weights as they are trained, by Magnitude; got {pruner!r}. "
            "Use OneShotPrune for a pruner that needs calibration or changes the weights"
        )
    pattern = pruner.pattern
    if scope not in ("global", "layer"):
        raise ValueError(f'IterativePrune: scope must be "global" or "layer", got {scope!r}')
    if isinstance(pattern, NM):
        raise ValueError(
            f"IterativePrune: {pattern} has one sparsity and cannot follow a schedule; use OneShotPrune for it, or "
            "Unstructured, Block, Rows or Columns"
        )
    if scope == "global" and not (isinstance(pattern, Unstructured) and pattern.per is None):
        raise ValueError(
            f"IterativePrune: {pattern} is a structure inside one layer, and scope='global' compares single weights of "
            "all layers; use scope='layer'"
        )
    if pattern.sparsity != target:
        raise ValueError(
            f"IterativePrune: the schedule ends at {target} and the pattern says {pattern.sparsity}; give both the "
            "same, or leave out pruner="
        )
