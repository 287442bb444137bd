"""Pruners that are a score and a pattern; no weight is changed."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.protocol import (
    Pruned,
    as_pruned,
    check_pattern,
    check_statistic,
    check_weight,
    widened,
)
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import Pool, in_pool

MakeStatistic = Callable[[int, torch.device | str | None], Statistic | None]
Score = Callable[..., Float[Tensor, "out in"]]


class ScorePruner(ABC):
    """
    A pruner that removes what scores least.

    Attributes:
        pattern: what to remove; a structure's score is the sum over it.
        pool: among which weights `Unstructured(per=None)` chooses: "row" or "layer".
    """

    pattern: Pattern
    pool: Pool = "layer"

    def __post_init__(self) -> None:
        check_pattern(type(self).__name__, self.pattern)

    @abstractmethod
    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Any:
        """Makes an empty statistic of the layer's inputs; None if scores need none."""

    @abstractmethod
    def scores(self, weight: Float[Tensor, "..."], statistic: Statistic | None = None) -> Float[Tensor, "..."]:
        """Computes how much each weight matters, in float32 or float64; higher is more."""

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None = None) -> Pruned:
        """Equivalent to sorting the scores of each pool and zeroing the smallest; see `Pruner`."""
        check_weight(weight, self.pattern)
        if self.statistic(1) is not None:
            check_statistic(type(self).__name__, weight, statistic)
        keep = in_pool(self.pattern, self.pool).keep(self.scores(weight, statistic))
        return as_pruned(weight, weight, keep, statistic)


def _no_statistic(in_features: int, device: torch.device | str | None = None) -> None:
    """None: the scores need no calibration."""


@dataclass(frozen=True, repr=False)
class Scored(ScorePruner):
    """
    Makes a pruner of a score function.

    It works wherever the package's pruners do: one-shot, with an allocation, streamed, in a sweep, and, if the score
    needs no statistic, in `IterativePrune`.

    >>> from prune_callbacks import InputNorm, Unstructured
    >>> def wanda(weight, inputs):
    ...     return weight.abs() * inputs.squared_norm.sqrt()
    >>> Scored(Unstructured(0.5), score=wanda, statistic=InputNorm, pool="row")
    Scored(Unstructured(sparsity=0.5, per=None), score=wanda, statistic=InputNorm, pool='row')

    Args:
        pattern: what to remove.
        score: called with the weight, (out, in), in float32 or float64, and the filled statistic (None without one; it
            may be left out of a function of one argument). Returns scores of the weight's shape, no NaN.
        statistic: makes an empty statistic from (in_features, device), such as `InputNorm` or `Gram`; None: the score
            needs none.
        pool: among which weights `Unstructured(per=None)` chooses: "row" or "layer".

    Raises:
        ValueError: `score` is no function of one or two arguments, or `pool` is another word.
    """

    pattern: Pattern
    score: Score = field(kw_only=True)
    statistic: MakeStatistic | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    pool: Pool = field(default="layer", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistic is None:
            object.__setattr__(self, "statistic", _no_statistic)
        if self.pool not in ("row", "layer"):
            raise ValueError(f'Scored: pool must be "row" or "layer", got {self.pool!r}')
        if not callable(self.score) or not callable(self.statistic):
            raise ValueError(
                f"Scored: score is a function of (weight, statistic) and statistic a class such as InputNorm or None, "
                f"got {self.score!r} and {self.statistic!r}"
            )
        if self.statistic is not _no_statistic and self._arguments() < 2:
            raise ValueError(
                f"Scored: {_name(self.score)} takes one argument and would not see the {_name(self.statistic)}; write "
                "it as a function of (weight, statistic)"
            )

    def scores(self, weight: Float[Tensor, "..."], statistic: Statistic | None = None) -> Float[Tensor, "..."]:
        """Calls `score` on the weight, widened to float32 or float64, and checks the shape of what it returns."""
        working = widened(weight, statistic)
        scores = self.score(working) if self._arguments() < 2 else self.score(working, statistic)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
            raise ValueError(
                f"{_name(self.score)} must return a score for every weight, shape {tuple(weight.shape)}, got {found}"
            )
        return scores

    def _arguments(self) -> int:
        """How many positional arguments `score` takes, at most two."""
        try:
            kinds = [parameter.kind for parameter in signature(self.score).parameters.values()]
        except ValueError:  # of functions like torch.abs nobody knows
            return 1 if self.statistic is _no_statistic else 2
        if Parameter.VAR_POSITIONAL in kinds:
            return 2
        return sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)

    def __repr__(self) -> str:
        # Without addresses, which differ between processes: files of results are compared by it.
        made = None if self.statistic is _no_statistic else _name(self.statistic)
        return f"Scored({self.pattern!r}, score={_name(self.score)}, statistic={made}, pool={self.pool!r})"


def _name(function: Any) -> str:
    """Returns a function's name, of a lambda with a mark of its code: two of them are not the same score."""
    name = str(getattr(function, "__qualname__", repr(function))).rpartition("<locals>.")[2]
    if name != "<lambda>":
        return name
    code = function.__code__
    return f"<lambda {hashlib.sha256(repr((code.co_code, code.co_consts, code.co_names)).encode()).hexdigest()[:8]}>"
