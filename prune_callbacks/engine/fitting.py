"""Compares the matrices to prune with a pattern, which must fit their shapes."""

import warnings
from collections.abc import Collection, Mapping

from prune_callbacks.anatomy.changeable import check_changeable, refuse_overlaps
from prune_callbacks.anatomy.names import naming
from prune_callbacks.anatomy.target import Target
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import rounds
from prune_callbacks.reconstruction.settings import check_reconstruction
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import kept_of_group


def as_pattern_needs(target: Target, pattern: Pattern) -> Target:
    """Returns the target with its columns in the order that the pattern needs: N:M goes along input channels."""
    return target.by_channel() if kept_of_group(pattern) is not None else target


def without_misfits(chosen: Mapping[str, Target], pattern: Pattern) -> tuple[dict[str, Target], dict[str, str]]:
    """
    Returns the targets whose shapes fit a pattern, and why the others stay dense, by name; warns of those once.

    Raises:
        ValueError: none fits.
    """
    fitting: dict[str, Target] = {}
    misfits: dict[str, str] = {}
    for name, target in chosen.items():
        try:
            check_shape(target, pattern)
        except ValueError as error:
            misfits[target.stored_name] = str(error)
        else:
            fitting[name] = target
    if misfits:
        first = next(iter(misfits))
        if not fitting:
            raise ValueError(f"no layer fits {pattern}; first {first}: {misfits[first]}")
        warnings.warn(f"{len(misfits)} layers stay dense, first {first}: {misfits[first]}", stacklevel=4)
    return fitting, misfits


def check_prunable(target: Target, pattern: Pattern, *, unread: bool = False) -> None:
    """
    Raises ValueError, naming the layer, for a weight that cannot be pruned: see `check_changeable`, or misshapen.

    Args:
        target: the matrix.
        pattern: the pattern, which must fit the matrix's shape.
        unread: whether the values need not be there: they will be read from files, or a strategy has sharded them.
    """
    check_changeable(target, unread=unread)
    with naming(target.name):
        check_shape(target, pattern)


def check_all_prunable(targets: Collection[Target], pattern: Pattern) -> None:
    """Raises ValueError, naming the layers, for weights that cannot be pruned in a fit, which may shard them later."""
    for target in targets:
        check_prunable(target, pattern, unread=True)
    refuse_overlaps(targets)


def check_shape(target: Target, pattern: Pattern) -> None:
    """Raises ValueError for a matrix that the pattern does not fit; groups of N:M must lie inside of `target.run`."""
    rows, columns = target.shape
    group = kept_of_group(pattern)
    if group is not None and target.convolution and target.run % group[1]:
        raise ValueError(
            f"{pattern} needs input channels (of a group) divisible by {group[1]}, got {target.run}. Choose another m, "
            "or leave this layer out of `targets`"
        )
    pattern.check_shape((rows // target.groups, columns))


def check_reconstructible(who: str, reconstruction: object, pruner: Pruner, order: str = "sequential") -> None:
    """Raises ValueError, naming who asks, if something is no reconstruction, or cannot train what a pruner leaves."""
    check_reconstruction(who, reconstruction)
    if reconstruction is None:
        return
    if rounds(pruner):
        raise ValueError(
            f"{type(pruner).__name__} rounds the weights, and reconstruction would move them off their grid: prune "
            "without rounding, and quantize afterwards"
        )
    if order == "at_once":
        raise ValueError(
            'reconstruction trains block after block, each on the outputs of those before it: use order="sequential"'
        )


def check_trainable(targets: Mapping[str, Target], *, unread: bool) -> None:
    """
    Raises ValueError if reconstruction has nothing to train, because all targets are frozen.

    Args:
        targets: the targets, by name.
        unread: whether the values are read from files, where `requires_grad` says nothing.
    """
    if not unread and not any(target.parameter.requires_grad for target in targets.values()):
        raise ValueError(
            "reconstruction trains the weights that are kept, and all of them are frozen (requires_grad=False): "
            "unfreeze those of the targets. Under adapters the base is frozen: prune before you add them"
        )
