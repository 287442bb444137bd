"""Pruners of a score and a pattern; survivors stay unchanged."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.identity import identity, plain_name
from prune_callbacks.pruners.protocol import (
    Pruned,
    as_pruned,
    check_pattern,
    check_statistic,
    check_weight,
    widened,
)
from prune_callbacks.pruners.questions import needs_calibration
from prune_callbacks.solvers.statistics import Statistic
from prune_callbacks.sparsity import Pattern
from prune_callbacks.sparsity.questions import Pool, in_pool

MakeStatistic = Callable[[int, torch.device | str | None], Statistic | None]
Score = Callable[..., Float[Tensor, "out in"]]


class ScorePruner(ABC):
    """
    A pruner that removes the weights of lowest score.

    A subclass is a frozen dataclass: it declares `pattern` first, then the settings of its score.

    Attributes:
        pattern: the allowed masks, with the sparsity; the score of a structure is the sum over its weights.
        pool: the pool of `Unstructured(per=None)`: "row" or "layer". Without effect on other patterns.
    """

    pattern: Pattern
    pool: Pool = "layer"

    def __post_init__(self) -> None:
        check_pattern(type(self).__name__, self.pattern)

    @abstractmethod
    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Any:
        """Makes an empty statistic of the layer's inputs; returns None if the scores need none."""

    @abstractmethod
    def scores(self, weight: Float[Tensor, "..."], statistic: Statistic | None = None) -> Float[Tensor, "..."]:
        """Computes the score of every weight, (out, in), in float32 or float64; higher scores are kept."""

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None = None) -> Pruned:
        """Prunes a layer; equivalent to sorting the scores of each pool and zeroing the lowest. See `Pruner`."""
        check_weight(weight, self.pattern)
        if needs_calibration(self):
            check_statistic(type(self).__name__, weight, statistic)
        keep = in_pool(self.pattern, self.pool).keep(self.scores(weight, statistic))
        return as_pruned(weight, weight, keep, statistic)


def _no_statistic(in_features: int, device: torch.device | str | None = None) -> None:
    """Returns None: the scores need no calibration."""


@dataclass(frozen=True, repr=False)
class Scored(ScorePruner):
    """
    Makes a pruner of a score function.

    The pruner works one-shot, with an allocation, streamed and in a sweep. If the score needs no statistic, it also
    works in `IterativePrune`. A resumed run and a sweep identify it by the name and a hash of the function's code, its
    defaults and the values that it captures.

    >>> from prune_callbacks import InputNorm, Unstructured
    >>> def wanda(weight, inputs):
    ...     return weight.abs() * inputs.squared_norm.sqrt()
    >>> Scored(Unstructured(0.5), score=wanda, statistic=InputNorm, pool="row")  # doctest: +ELLIPSIS
    Scored(Unstructured(sparsity=0.5, per=None), score=wanda#..., statistic=InputNorm, pool='row')

    Args:
        pattern: the allowed masks, with the sparsity.
        score: a function of (weight, statistic), or of (weight) alone if it needs no statistic. The weight is (out,
            in), in float32 or float64; the statistic is filled, or None. Returns scores of the weight's shape, no NaN.
        statistic: makes an empty statistic from (in_features, device), such as `InputNorm` or `Gram`; None: the score
            needs none.
        pool: the pool of `Unstructured(per=None)`: "row" or "layer". Without effect on other patterns.

    Raises:
        ValueError: `score` or `statistic` is no function, `score` takes no statistic though one is given, or `pool` is
            another word.
    """

    pattern: Pattern
    score: Score = field(kw_only=True)
    statistic: MakeStatistic | None = field(default=_no_statistic, kw_only=True)  # type: ignore[assignment]
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
                f"Scored: {plain_name(self.score)} takes one argument and would not see the "
                f"{plain_name(self.statistic)}; write it as a function of (weight, statistic)"
            )
        if self.statistic is _no_statistic and self._arguments() == 2 and plain_name(self.score) != "<lambda>":
            raise ValueError(
                f"Scored: {plain_name(self.score)} takes two arguments and no statistic is given for the second; add "
                "statistic=InputNorm, or another, or write it as a function of the weight alone"
            )
        if " at 0x" in repr(self):
            raise ValueError(
                f"Scored: {self!r} names an object by its address, which differs between processes; resumed runs and "
                "sweeps would take it for another score. Use a function, or make a dataclass of `ScorePruner`"
            )

    def scores(self, weight: Float[Tensor, "..."], statistic: Statistic | None = None) -> Float[Tensor, "..."]:
        """Calls `score` on the weight, in float32 or float64; raises ValueError if the scores have another shape."""
        working = widened(weight, statistic)
        if working.data_ptr() == weight.data_ptr():
            working = working.clone()  # a score that works in place must not change the model
        try:
            scores = self.score(working) if self._arguments() < 2 else self.score(working, statistic)
        except Exception as error:
            error.add_note(f"raised by the score {plain_name(self.score)} of {type(self).__name__}")
            raise
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
            raise ValueError(
                f"{plain_name(self.score)} must return a score for every weight, shape {tuple(weight.shape)}, "
                f"got {found}"
            )
        return scores

    def _arguments(self) -> int:
        """Returns how many positional arguments to call `score` with, one or two."""
        without = self.statistic is _no_statistic
        try:
            parameters = signature(self.score).parameters.values()
        except ValueError:  # functions like torch.abs have no signature
            return 1 if without else 2
        if Parameter.VAR_POSITIONAL in {parameter.kind for parameter in parameters}:
            return 2
        by_place = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        # An argument with a default is a setting of the score, if there is no statistic to pass.
        places = [p for p in parameters if p.kind in by_place and not (without and p.default is not Parameter.empty)]
        return min(len(places), 2)

    def __repr__(self) -> str:
        # No addresses, which differ between processes: resumed runs and files of results compare this text.
        made = None if self.statistic is _no_statistic else identity(self.statistic)
        return f"Scored({self.pattern!r}, score={identity(self.score)}, statistic={made}, pool={self.pool!r})"
