"""Choosing which of the weights that are left go next, over all layers or layer by layer."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from prune_callbacks.anatomy.names import naming
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import pool, scores_of_weights
from prune_callbacks.ranks import Ranks
from prune_callbacks.sparsity import MaskSet, Pattern, keep_largest_of_all
from prune_callbacks.sparsity.questions import at_sparsity, in_pool, removes_single_weights

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
    pruner: Pruner,
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
        pattern = in_pool(at_sparsity(pruner.pattern, sparsity), pool(pruner))
        chosen = MaskSet.join(
            MaskSet({name: _keep_in_layer(weights, name, pruner, pattern, name in input_first)}) for name in names
        )
    return weights.masks & chosen


def _keep_in_layer(weights: SharedWeights, name: str, pruner: Pruner, pattern: Pattern, input_first: bool) -> Tensor:
    # In the sum over a structure what is gone has zero; of single weights it goes below survivors that happen to be so.
    lowest = -torch.inf if removes_single_weights(pattern) else 0.0
    weight = weights.read(name)

    def choose() -> Tensor:
        removed = ~weights.masks[name].to(weight.device)
        stored = [weight, removed] if weight.ndim == 3 else [weight[None], removed[None]]  # of experts: one by one
        matrices, gone = (tensor.mT if input_first else tensor for tensor in stored)
        kept = [
            pattern.keep(_scores(pruner)(matrix).masked_fill(without, lowest))
            for matrix, without in zip(matrices, gone, strict=True)
        ]
        keep = torch.stack([mask.T if input_first else mask for mask in kept])
        return (keep if weight.ndim == 3 else keep[0]).cpu()

    with naming(name):
        return weights.ranks.share(weights.ranks.attempt(choose))


@dataclass(frozen=True)
class _OwnScores(Mapping[str, Tensor]):
    """The scores of this rank's parts, made when asked for, so never all at once; of what is gone, minus infinity."""

    weights: SharedWeights
    names: Collection[str]
    pruner: Pruner

    def __getitem__(self, name: str) -> Tensor:
        return _scores(self.pruner)(self.weights.own(name)).masked_fill(~self.weights.own_keep(name), -torch.inf)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _scores(pruner: Pruner) -> Callable[..., Tensor]:
    scores = scores_of_weights(pruner)
    assert scores is not None
    return scores


def check_shrinkable(pruner: Pruner, scope: str, target: float) -> None:
    """Raises ValueError unless the pruner can follow a schedule to `target` in this scope."""
    if scores_of_weights(pruner) is None:
        raise ValueError(
            "IterativePrune chooses among the weights as they are trained, by Magnitude or another score that needs no "
            f"calibration; got {pruner!r}. Use OneShotPrune for a pruner that needs calibration or changes the weights"
        )
    pattern = pruner.pattern
    if scope not in ("global", "layer"):
        raise ValueError(f'IterativePrune: scope must be "global" or "layer", got {scope!r}')
    try:
        at_sparsity(pattern, target)
    except ValueError as error:
        raise ValueError(
            f"IterativePrune: {pattern} has one sparsity and cannot follow a schedule; use OneShotPrune for it, or "
            "Unstructured, Block, Rows or Columns"
        ) from error
    if scope == "global" and not _is_one_pool(pruner):
        raise ValueError(
            f"IterativePrune: {pattern} is a structure inside one layer, and scope='global' compares single weights of "
            "all layers; use scope='layer'"
        )
    if scope == "global" and not _is_elementwise(pruner):
        raise ValueError(
            f"IterativePrune: the score of {pruner!r} depends on a layer's other weights, and scope='global' compares "
            "single weights of all layers; use scope='layer'"
        )
    if pattern.sparsity != target:
        raise ValueError(
            f"IterativePrune: the schedule ends at {target} and the pattern says {pattern.sparsity}; give both the "
            "same, or leave out pruner="
        )


def _is_one_pool(pruner: Pruner) -> bool:
    """Returns whether single weights go, and the pattern does not say from which pool."""
    pattern = pruner.pattern
    return removes_single_weights(pattern) and getattr(pattern, "per", None) is None and pool(pruner) == "layer"


def _is_elementwise(pruner: Pruner) -> bool:
    """Returns whether a weight's score is the same whatever weights stand beside it: tried on drawn numbers."""
    scores = _scores(pruner)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    try:
        part = scores(weight.flatten()[3:11])
    except (IndexError, RuntimeError, ValueError):  # it wants a matrix
        return False
    return torch.equal(scores(weight).flatten()[3:11], part)
