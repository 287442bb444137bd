"""What a pruner is, what it returns, and what every pruner checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.linalg import NumericalError, all_finite, quadratic_form
from prune_callbacks.solvers.statistics import Gram, InputNorm, Statistic
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class Pruned:
    """
    What a pruner returns for one layer.

    Attributes:
        weight: pruned and, where the method does so, compensated; shape, dtype and device of the dense one.
        keep: True where a weight is kept; shape (out, in).
        loss: `sum over rows of d G d^T` with `d = weight - dense` and the undamped Gram `G`, the squared error
            of the layer's output over all calibration tokens. None if the pruner had no Gram.
        scale: what a weight is a whole multiple of, where the pruner also rounded, float16; see `Grid`. Else None.
    """

    weight: Float[Tensor, "out in"]
    keep: Bool[Tensor, "out in"]
    loss: float | None
    scale: Float[Tensor, "out groups"] | None = None


@runtime_checkable
class Pruner(Protocol):
    """
    Removes weights of one linear layer.

    `prune` never changes its arguments. It computes in float32, or in float64 if the weight or the statistic is, and on
    the statistic's device; the result is on the weight's. It raises ValueError for a shape that the pattern does not
    fit, a weight with NaN or inf, or a statistic of the wrong kind or size, and NumericalError if the Gram cannot be
    factorised.

    A pruner may answer further questions, by attributes that have a default; see `prune_callbacks.pruners.questions`.
    """

    @property
    def pattern(self) -> Pattern: ...

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram | InputNorm | None:
        """An empty statistic to stream the layer's inputs into; None if no calibration is needed."""

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned: ...


@runtime_checkable
class JointPruner(Pruner, Protocol):
    """A pruner that can solve for several layers with the same input at once."""

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """
        Equivalent to `prune` for each of the weights, which share one dtype and device, with the same statistic.

        One factorisation of the Gram serves them all, and their rows are solved for together; the mask of each is
        its own.
        """
        ...


def check_pruner(name: str, pruner: object, example: str = "Wanda(Unstructured(0.5))") -> None:
    """
    Refuses a value that is not a complete pruner, such as a class or a pattern.

    Args:
        name: the function or class that received it, for the message.
        pruner: the value.
        example: a pruner that `name` accepts, for the message.

    Raises:
        ValueError: it is a class, or lacks a part of `Pruner`.
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
    Makes the result for a layer: on its device and in its dtype, zeros exact, with its loss under a Gram.

    Args:
        dense: the weight that was pruned.
        solved: the new weight, in the dtype that was computed in.
        keep: its mask.
        statistic: of the layer's inputs.
        scale: see `Pruned`.
        loss: as the solver knows it, of `solved`; where that is rounded to another dtype it is computed anew.

    Raises:
        NumericalError: the new weights hold NaN or inf.
    """
    keep = keep.to(dense.device)
    weight = solved.to(dense) * keep.to(dense.dtype) + 0  # the last turns -0 into 0
    if not all_finite(weight):
        raise NumericalError(
            f"the pruned weights hold NaN or inf in {weight.dtype}. Use a larger damping, more calibration tokens, or "
            "a dtype with a wider range"
        )
    if isinstance(statistic, Gram) and (loss is None or weight.dtype != solved.dtype):
        change = weight.to(statistic.matrix) - dense.to(statistic.matrix)
        loss = quadratic_form(change, statistic.matrix)
    # Not below zero, which rounding can do where the loss is zero.
    loss = None if loss is None else max(0.0, loss)
    return Pruned(weight, keep, loss, None if scale is None else scale.to(dense.device).half())


def widened(weight: Tensor, statistic: Statistic | None) -> Tensor:
    """
    The weight as it is computed with: in float32, or in float64 if it or the statistic is; where the statistic is.

    A Gram is larger than most weights, and a device that has room for it is the one to solve on.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if statistic is None:
        return weight.detach().to(dtype)
    known = statistic.squared_norm
    return weight.detach().to(known.device, torch.promote_types(dtype, known.dtype))


def check_weight(weight: Tensor, pattern: Pattern) -> None:
    """Raises ValueError for a weight that no pruner takes: of a shape that does not fit, or with NaN or inf."""
    if weight.ndim != 2:
        raise ValueError(f"a weight must have two dimensions, (out, in), got shape {tuple(weight.shape)}")
    pattern.check_shape((weight.shape[0], weight.shape[1]))
    if not all_finite(weight):
        raise ValueError("the dense weight holds NaN or inf")


def check_statistic(name: str, weight: Tensor, statistic: Statistic | None) -> Statistic:
    """The statistic; ValueError if there is none, or it is empty, not finite, or of another layer."""
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
    """Raises ValueError for what is no pattern."""
    if not isinstance(pattern, Pattern):
        raise ValueError(f"{name} takes a pattern such as Unstructured(0.5) or NM(2, 4), got {pattern!r}")
