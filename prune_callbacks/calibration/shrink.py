"""Choosing which of the weights that are left go next, over all layers or layer by layer."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from prune_callbacks.calibration.blocks import oriented
from prune_callbacks.pruners import Magnitude
from prune_callbacks.sparsity import NM, MaskSet, Unstructured, keep_largest_of_all

Scope = Literal["global", "layer"]


@torch.no_grad()
def shrink_masks(
    layers: Mapping[str, nn.Module], masks: MaskSet, sparsity: float, pruner: Magnitude, scope: Scope
) -> MaskSet:
    """
    The masks of a higher sparsity: what `masks` removes stays removed, the survivors of lowest score go.

    Equivalent to pruning the masked weights, what is already removed going first. The count is exact:
    `round(sparsity * weights)` removed over all layers (global), or by the pattern in every layer.

    Args:
        layers: the layers, by name; their `weight` parameters are read.
        masks: the masks in force, by parameter name.
        sparsity: fraction of the weights of these layers that is removed in the end.
        pruner: gives the scores, and the pattern for `scope="layer"`; the sparsity of its pattern is not used.
        scope: "global": one pool of all layers. "layer": the same sparsity in every layer.
    """
    scores = _Scores(layers, masks, pruner)
    chosen: Iterable[tuple[str, Tensor]]
    if scope == "global":
        total = sum(layer.get_parameter("weight").numel() for layer in layers.values())
        chosen = keep_largest_of_all(scores, total - round(sparsity * total))
    else:
        pattern = replace(pruner.pattern, sparsity=sparsity)  # type: ignore[type-var]
        chosen = ((name, pattern.keep(values)) for name, values in scores.items())
    return masks & MaskSet.join(MaskSet({f"{name}.weight": oriented(layers[name], keep)}) for name, keep in chosen)


@dataclass(frozen=True)
class _Scores(Mapping[str, Tensor]):
    """
    The scores of the layers; made when asked for, so never all at once.

    What is gone has minus infinity, below survivors that happen to be zero; in the sum over a structure it has zero.
    """

    layers: Mapping[str, nn.Module]
    masks: MaskSet
    pruner: Magnitude

    def __getitem__(self, name: str) -> Tensor:
        layer = self.layers[name]
        weight = oriented(layer, layer.get_parameter("weight"))
        removed = ~oriented(layer, self.masks[f"{name}.weight"]).to(weight.device)
        lowest = -torch.inf if isinstance(self.pruner.pattern, Unstructured) else 0.0
        return self.pruner.scores(weight).masked_fill(removed, lowest)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


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
