"""The masks of a checkpoint: those that its callbacks hold, else the zeros of its matrices."""

import warnings
from typing import Any

from torch import nn

from prune_callbacks.anatomy.blocks import NoBlocksError, find_blocks
from prune_callbacks.anatomy.ends import embedded_weights
from prune_callbacks.anatomy.targets import SPARSE, matrices
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.checkpoints import TrainingCheckpoint

WEIGHTS_ALONE = "the checkpoint holds weights alone (save_weights_only=True)"
NO_MASKS = (
    "the checkpoint holds no masks: it was written without MaskEnforcer, IterativePrune or OneShotPrune, or before "
    "they had any (no callback in it holds masks)"
)


def checkpoint_masks(source: TrainingCheckpoint, places: dict[str, str], skeleton: nn.Module) -> MaskSet:
    """Returns the checkpoint's masks under the names of the model; there they may have names of an outer module."""
    held = held_masks(source)
    if not held:
        return _masks_of_zeros(source, places, skeleton)
    found = MaskSet.from_state_dict(held[0])
    tensors = {name: t for name, t in skeleton.state_dict(keep_vars=True).items() if name in places}
    own = {id(tensor): name for name, tensor in tensors.items()}
    theirs = found.matching({places[name]: tensor for name, tensor in tensors.items()})
    state = found.state_dict()
    return MaskSet.from_state_dict(
        {part: {own[id(t)]: state[part][mask] for mask, t in theirs.items()} for part in ("bits", "shapes")}
    )


def held_masks(source: TrainingCheckpoint) -> list[dict[str, Any]]:
    """Returns the states of the masks that callbacks hold."""
    # The callbacks by name, the one that holds the masks first; then subclasses, which have names of their own.
    names = dict.fromkeys(["MaskEnforcer", "IterativePrune", "OneShotPrune", *source.callbacks])
    states = [source.callbacks.get(name) for name in names]
    return [state["masks"] for state in states if isinstance(state, dict) and isinstance(state.get("masks"), dict)]


def _why_zeros(source: TrainingCheckpoint) -> str:
    """Returns why a checkpoint without masks has none."""
    return WEIGHTS_ALONE if source.weights_only else NO_MASKS


def from_zeros(source: TrainingCheckpoint) -> str:
    """Returns the sentence that the masks of a checkpoint are zeros, and why."""
    return f"{_why_zeros(source)}, so the masks are the zeros of the model"


def _masks_of_zeros(source: TrainingCheckpoint, places: dict[str, str], skeleton: nn.Module) -> MaskSet:
    """Returns the zeros of the matrices that are sparse, for a checkpoint without masks."""
    prunable = _prunable(skeleton)
    tensors = skeleton.state_dict(keep_vars=True)
    found: list[MaskSet] = []
    for name, place in places.items():
        if id(tensors[name]) not in prunable:
            continue
        weight = source.read(place)
        if float((weight == 0).float().mean()) >= SPARSE:
            found.append(MaskSet.from_nonzero({name: weight}))
    if not found:
        raise ValueError(
            f"{_why_zeros(source)}; and none of its matrices has {SPARSE:.0%} of zeros that could stand for them"
        )
    warnings.warn(
        f"{from_zeros(source)}: {len(found)} matrices with {MaskSet.join(found).sparsity():.2%}",
        stacklevel=4,
    )
    return MaskSet.join(found)


def _prunable(skeleton: nn.Module) -> set[int]:
    """Returns the ids of the matrices in the decoder blocks; without blocks, of all that are no embeddings."""
    try:
        return {id(parameter) for parameter in matrices(find_blocks(skeleton)).values()}
    except NoBlocksError:
        return {id(p) for p in skeleton.parameters() if p.ndim > 1} - embedded_weights(skeleton)
