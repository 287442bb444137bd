"""The Protocols of a pruner, its result, and the checks that all pruners share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.interfaces import compared_by_name
from prune_callbacks.solvers.linalg import NumericalError, all_finite, quadratic_form
from prune_callbacks.solvers.statistics import Gram, InputNorm, Statistic
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class Pruned:
    """
    The result of pruning one layer.

    Attributes:
        weight: the pruned and possibly compensated weight, (out, in), in dtype and on the device of the dense weight.
        keep: bool, (out, in); True where a weight is kept. On the device of the weight.
        loss: `sum over rows of d G d^T` with `d = weight - dense` and the undamped Gram `G`: the squared error
            of the layer's output, summed over all calibration tokens. None if the pruner has no Gram.
        scale: the scale of every group of weights, (out, groups), float16, if the pruner also rounds; see `Grid`. Every
            weight is a whole multiple of its group's scale. Else None.
    """

    weight: Float[Tensor, "out in"]
    keep: Bool[Tensor, "out in"]
    loss: float | None
    scale: Float[Tensor, "out groups"] | None = None


@compared_by_name
@runtime_checkable
class Pruner(Protocol):
    """
    Removes weights of one linear layer.

    `prune` never changes its arguments. It computes in float32, or in float64 if the weight or the statistic is
    float64. It computes on the statistic's device and returns the result on the weight's device. It raises ValueError
    for a shape that does not fit the pattern, a weight with NaN or inf, or a statistic of the wrong kind or size. It
    raises NumericalError if the Gram cannot be factorised.

    `statistic(1)` is called to ask whether the pruner needs calibration. So `statistic` must be cheap and accept 1.

    `repr(pruner)` identifies the pruner when a run resumes and in sweeps. It must not contain an address. If it
    contains the name of a function, use a named function, and rename it when you change it.

    Optional attributes and their defaults are listed in `prune_callbacks.pruners.questions`. One of them is `pool`; of
    the package's patterns it affects `Unstructured(per=None)` only.
    """

    @property
    def pattern(self) -> Pattern: ...

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram | InputNorm | None:
        """Makes an empty statistic to stream the layer's inputs into; returns None if no calibration is needed."""

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """Returns the pruned layer, given the filled statistic of its inputs (None if `statistic` returns None)."""


@runtime_checkable
class JointPruner(Pruner, Protocol):
    """A pruner that can solve for several layers at once if they share their input."""

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """
        Prunes layers that share their input; equivalent to `prune` of each weight with the same statistic.

        All weights have one dtype and device. One factorisation of the Gram serves all layers, and their rows are
        solved for together. Every layer has a mask of its own.
        """
        ...


def check_pruner(name: str, pruner: object, example: str = "Wanda(Unstructured(0.5))") -> None:
    """
    Raises ValueError for a value that is not a complete pruner, such as a class or a pattern.

    Args:
        name: the function or class that received the value, for the message.
        pruner: the value.
        example: a pruner that `name` accepts, for the message.

    Raises:
        ValueError: the value is a class, or lacks a part of `Pruner`.
    """
    needed = ("pattern", "prune", "statistic")
    if isinstance(pruner, type) or not any(hasattr(pruner, part) for part in ("prune", "statistic")):
        raise ValueError(f"{name} takes a pruner such as {example}, got {pruner!r}")
    missing = [part for part in needed if not hasattr(pruner, part)]
    if missing:
        raise ValueError(
            f"{name} takes a pruner such as {example}, which has {', '.join(needed)}; {pruner!r} has no "
            f"{' and no '.join(missing)}"
        )


def as_pruned(
    dense: Tensor,
    solved: Tensor,
    keep: Tensor,
    statistic: Statistic | None,
    scale: Tensor | None = None,
    loss: float | None = None,
) -> Pruned:
    """
    Makes the result for a layer, on the device and in the dtype of `dense`, with exact zeros.

    Args:
        dense: the weight before pruning, (out, in).
        solved: the new weight, (out, in), in the dtype of the computation.
        keep: the mask, bool, (out, in).
        statistic: the statistic of the layer's inputs. With a `Gram` the result has a loss.
        scale: see `Pruned`.
        loss: the solver's loss of `solved`. None, or a result of another dtype: computed from the Gram.

    Raises:
        NumericalError: the new weights hold NaN or inf.
    """
    keep = keep.to(dense.device)
    weight = solved.to(dense) * keep.to(dense.dtype) + 0  # + 0 turns -0 into 0
    if not all_finite(weight):
        raise NumericalError(
            f"the pruned weights hold NaN or inf in {weight.dtype}. Use a larger damping, more calibration tokens, or "
            "a dtype with a wider range"
        )
    if isinstance(statistic, Gram) and (loss is None or weight.dtype != solved.dtype):
        change = weight.to(statistic.matrix) - dense.to(statistic.matrix)
        loss = quadratic_form(change, statistic.matrix)
    # Rounding errors can make a loss of zero negative.
    loss = None if loss is None else max(0.0, loss)
    return Pruned(weight, keep, loss, None if scale is None else scale.to(dense.device).half())


def widened(weight: Tensor, statistic: Statistic | None) -> Tensor:
    """
    Returns the weight in float32, or in float64 if it or the statistic is float64, on the statistic's device.

    A Gram is larger than most weights, so solvers run on the device that has room for it.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if statistic is None:
        return weight.detach().to(dtype)
    known = statistic.squared_norm
    return weight.detach().to(known.device, torch.promote_types(dtype, known.dtype))


def check_weight(weight: Tensor, pattern: Pattern) -> None:
    """Raises ValueError for a weight that has NaN or inf, or a shape that does not fit the pattern."""
    if weight.ndim != 2:
        raise ValueError(f"a weight must have two dimensions, (out, in), got shape {tuple(weight.shape)}")
    pattern.check_shape((weight.shape[0], weight.shape[1]))
    if not all_finite(weight):
        raise ValueError("the dense weight holds NaN or inf")


def check_statistic(name: str, weight: Tensor, statistic: Statistic | None) -> Statistic:
    """Returns the statistic; raises ValueError if it is None, empty, not finite, or of another layer."""
    if statistic is None:
        raise ValueError(f"{name} needs calibration statistics, got None; fill the one that {name}.statistic() makes")
    if len(statistic.squared_norm) != weight.shape[1]:
        raise ValueError(
            f"statistics of {len(statistic.squared_norm)} input features for a weight of shape {tuple(weight.shape)}"
        )
    if statistic.tokens == 0:
        raise ValueError("the calibration statistics are empty: no token was added")
    if not all_finite(statistic.squared_norm):
        raise ValueError("the calibration activations hold NaN or inf: the inputs of this layer are not finite numbers")
    return statistic


def check_pattern(name: str, pattern: Pattern) -> None:
    """Raises ValueError for a value that is no pattern."""
    missing = [part for part in ("sparsity", "keep", "check_shape", "holds") if not hasattr(pattern, part)]
    if isinstance(pattern, type) or len(missing) == 4:
        raise ValueError(f"{name} takes a pattern such as Unstructured(0.5) or NM(2, 4), got {pattern!r}")
    if missing:
        raise ValueError(
            f"{name} takes a pattern with sparsity, keep, check_shape and holds; {type(pattern).__name__} lacks "
            f"{', '.join(missing)}"
        )
