"""Raises the sparsity of masks: chooses survivors to remove, over all layers or layer by layer."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from prune_callbacks.anatomy.names import naming
from prune_callbacks.anatomy.target import Target
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import pool, scores_of_weights
from prune_callbacks.ranks import Ranks
from prune_callbacks.sparsity import MaskSet, Pattern, keep_largest_of_all
from prune_callbacks.sparsity.questions import at_sparsity, in_pool, removes_single_weights

Scope = Literal["global", "layer"]


@runtime_checkable
class SharedWeights(Protocol):
    """Masked weights that are spread over ranks; see `prune_callbacks.parallel.access.ParamAccess` for the methods."""

    masks: MaskSet
    ranks: Ranks

    def own(self, name: str) -> Tensor: ...

    def own_keep(self, name: str) -> Tensor: ...

    def joined(self, own: Iterable[tuple[str, Tensor]]) -> MaskSet: ...

    def read(self, name: str) -> Tensor: ...


@torch.no_grad()
def shrink_masks(
    weights: SharedWeights,
    targets: Mapping[str, Sequence[Target]],
    sparsity: float,
    pruner: Pruner,
    scope: Scope,
) -> MaskSet:
    """
    Returns masks of a higher sparsity: removed weights stay removed, and the survivors of lowest score are removed.

    Equivalent to pruning the masked weights with a score below all others for removed weights. The count is exact:
    `round(sparsity * weights)` over all layers for scope "global", the pattern's count in every layer for "layer". The
    model is never gathered. The global threshold comes from histograms; for "layer", whole weights are gathered one
    layer at a time. A collective of the ranks, which all get the same masks.

    Args:
        weights: the weights, and the masks in force.
        targets: the matrices in the masked parameters to choose from, by the parameter's name.
        sparsity: the fraction of weights in these parameters that the returned masks remove, in [0, 1).
        pruner: gives the scores, and the pattern for `scope="layer"`; the sparsity of its pattern is not used.
        scope: "global": one pool of all layers. "layer": the same sparsity in every layer.
    """
    if scope == "global":
        total = sum(torch.Size(weights.masks.shape(name)).numel() for name in targets)
        kept = total - round(sparsity * total)
        chosen = weights.joined(keep_largest_of_all(_OwnScores(weights, targets, pruner), kept, weights.ranks))
    else:
        pattern = in_pool(at_sparsity(pruner.pattern, sparsity), pool(pruner))
        chosen = MaskSet.join(
            MaskSet({name: _keep_in_layer(weights, name, pruner, pattern, own)}) for name, own in targets.items()
        )
    return weights.masks & chosen


def _keep_in_layer(
    weights: SharedWeights, name: str, pruner: Pruner, pattern: Pattern, targets: Sequence[Target]
) -> Tensor:
    # A removed weight adds 0 to its structure's score; a single one must lose even against survivors that score 0.
    lowest = -torch.inf if removes_single_weights(pattern) else 0.0
    weight = weights.read(name)

    def choose() -> Tensor:
        removed = ~weights.masks[name].to(weight.device)
        keep = torch.ones_like(removed)
        for target in targets:
            matrix, gone = (target.oriented(target.part_of(whole)) for whole in (weight, removed))
            groups = zip(matrix.chunk(target.groups), gone.chunk(target.groups), strict=True)
            kept = [pattern.keep(_scores(pruner)(part).masked_fill(without, lowest)) for part, without in groups]
            target.part_of(keep).copy_(target.as_stored(torch.cat(kept)))
        return keep.cpu()

    with naming(name):
        return weights.ranks.share(weights.ranks.attempt(choose))


@dataclass(frozen=True)
class _OwnScores(Mapping[str, Tensor]):
    """Computes the scores of this rank's part of a weight on access; the scores of removed weights are -inf."""

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
    """Returns the pruner's score function, which `check_shrinkable` has made sure of."""
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
    """Returns whether the pruner removes single weights, the pool is the layer, and the pattern names no other."""
    pattern = pruner.pattern
    return removes_single_weights(pattern) and getattr(pattern, "per", None) is None and pool(pruner) == "layer"


def _is_elementwise(pruner: Pruner) -> bool:
    """Returns whether a weight's score is independent of the other weights; tried on random numbers."""
    scores = _scores(pruner)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    try:
        part = scores(weight.flatten()[3:11])
    except (IndexError, RuntimeError, ValueError):  # the score needs a matrix
        return False
    return torch.equal(scores(weight).flatten()[3:11], part)
