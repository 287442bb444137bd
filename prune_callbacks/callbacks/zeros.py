"""Reads masks from the zeros of a sparse model."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from prune_callbacks.anatomy.targets import SPARSE
from prune_callbacks.parallel.strategies import masks_of_zeros
from prune_callbacks.sparsity import MaskSet


def masks_from_zeros(trainer: Trainer, weights: Mapping[str, Tensor], model: nn.Module) -> MaskSet:
    """
    Returns the masks of the nonzero weights of a model, sharded or not; a collective.

    Layers may begin as zeros, to be trained. So where no weight is sparse but some are zero as a whole, these have no
    mask, and a warning names the first.

    Args:
        trainer: the trainer of a running fit.
        weights: parameters of the model by name.
        model: the model.
    """
    masks = masks_of_zeros(trainer, weights, model)
    sparsity = masks.layer_sparsity()
    empty = [name for name, share in sparsity.items() if share == 1]
    if not empty or any(SPARSE <= share < 1 for share in sparsity.values()):
        return masks
    rank_zero_warn(
        f"{len(empty)} layers hold nothing but zeros, first {empty[0]}, and no other layer is sparse: they are taken "
        "for layers that begin so, and not for pruned ones. MaskEnforcer(masks) holds them"
    )
    return MaskSet.join(MaskSet({name: masks[name]}) for name in masks if name not in empty)
