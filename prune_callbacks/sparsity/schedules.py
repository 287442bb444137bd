"""
Sparsity schedules: pure functions from time to sparsity.

Time counts finished optimizer steps or finished epochs, as `unit` says. Sparsity is the fraction of all weights that
is removed; a target does not depend on the weights removed before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from prune_callbacks.interfaces import compared_by_name

Unit = Literal["step", "epoch"]


@compared_by_name
@runtime_checkable
class Schedule(Protocol):
    """
    The interface of a schedule: `target`, `unit`, `changes` and a call.

    The sparsity rises at the times in `changes` and is constant between them.
    """

    @property
    def target(self) -> float:
        """Returns the final sparsity."""

    @property
    def unit(self) -> Unit:
        """Returns "step" if times are finished optimizer steps, "epoch" if they are finished epochs."""

    @property
    def changes(self) -> Sequence[int]:
        """Returns the times at which the sparsity rises, ascending; it is constant between them."""

    def __call__(self, time: int) -> float:
        """Returns the sparsity after `time` finished steps or epochs; 0 before the first change."""


@dataclass(frozen=True)
class ConstantSchedule:
    """
    Prunes to the target in one step: `s(t) = target` from `begin` on.

    >>> schedule = ConstantSchedule(0.5, begin=100)
    >>> schedule(99), schedule(100)
    (0.0, 0.5)
    """

    target: float
    begin: int = 0
    unit: Unit = "step"

    def __post_init__(self) -> None:
        _check("ConstantSchedule", self.target, self.begin, 1, self.unit)

    @property
    def changes(self) -> Sequence[int]:
        """Returns `(begin,)`."""
        return (self.begin,)

    def __call__(self, time: int) -> float:
        return self.target if time >= self.begin else 0.0


@dataclass(frozen=True)
class _Ramp:
    """Rises from `initial` at `begin` to `target` at `end`; subclasses set the power of the curve."""

    target: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0
    unit: Unit = "step"

    _power: ClassVar[int]

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check(name, self.target, self.begin, self.every, self.unit)
        if not 0 <= self.initial < self.target:
            raise ValueError(
                f"{name}: the sparsity must rise, from initial in [0, target) to target; "
                f"got initial={self.initial}, target={self.target}"
            )
        length = self.end - self.begin
        if length < 1 or length % self.every:
            raise ValueError(
                f"{name}: end must lie a multiple of every={self.every} after begin={self.begin}, got {self.end}"
            )

    @property
    def changes(self) -> Sequence[int]:
        """Returns `begin` (if `initial` is not 0), then the multiples of `every` after it, up to `end`."""
        first = self.begin if self.initial > 0 else self.begin + self.every
        return range(first, self.end + 1, self.every)

    def __call__(self, time: int) -> float:
        if time < self.begin:
            return 0.0
        if time >= self.end:
            return self.target
        done = (time - self.begin) // self.every * self.every / (self.end - self.begin)
        return self.target + (self.initial - self.target) * (1 - done) ** self._power


@dataclass(frozen=True)
class LinearSchedule(_Ramp):
    """
    Rises from `initial` at `begin` to `target` at `end` in equal steps, one every `every` units.

    `s(t) = target + (initial - target) (1 - x)` with `x = (t - begin) / (end - begin)`, `t` rounded down to a change.

    >>> schedule = LinearSchedule(0.8, begin=10, end=50, every=10)
    >>> [round(schedule(t), 3) for t in (9, 10, 20, 29, 30, 50, 99)]
    [0.0, 0.0, 0.2, 0.2, 0.4, 0.8, 0.8]
    """

    _power = 1


@dataclass(frozen=True)
class CubicSchedule(_Ramp):
    """
    Gradual pruning, fast at first and slow in the end (Zhu & Gupta 2017, eq. 1).

    `s(t) = target + (initial - target) (1 - x)^3` with `x = (t - begin) / (end - begin)`, `t` rounded down to a change.

    >>> schedule = CubicSchedule(0.8, begin=0, end=40, every=10)
    >>> [round(schedule(t), 4) for t in (0, 9, 10, 20, 30, 40, 99)]
    [0.0, 0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """

    _power = 3


@dataclass(frozen=True)
class IMPSchedule:
    """
    Iterative magnitude pruning (Frankle & Carbin 2019): every round removes the same fraction of the survivors.

    After round r of R the kept fraction is `(1 - target)^(r / R)`, so `s = 1 - (1 - target)^(r / R)`. Round 1 trains
    the dense model and ends at `begin` (None: after `every`). Each later round ends `every` units after the previous
    one. Training should continue for another `every` units after the last change. With `Rewind(step=k)` set
    `begin = T` and `every = T - k`: then every round ends at step T of its own training.

    >>> schedule = IMPSchedule(0.9, rounds=2, every=70, begin=100)
    >>> [round(schedule(t), 3) for t in (99, 100, 169, 170)]
    [0.0, 0.684, 0.684, 0.9]
    >>> schedule.changes
    (100, 170)
    """

    target: float
    rounds: int
    every: int
    begin: int | None = None
    unit: Unit = "step"

    def __post_init__(self) -> None:
        _check("IMPSchedule", self.target, self._first, self.every, self.unit)
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"IMPSchedule: rounds is a whole number, at least 1, got {self.rounds}")

    @property
    def _first(self) -> int:
        return self.every if self.begin is None else self.begin

    @property
    def changes(self) -> Sequence[int]:
        """Returns the ends of the rounds."""
        return tuple(self._first + r * self.every for r in range(self.rounds))

    def __call__(self, time: int) -> float:
        ended = min(self.rounds, max(0, (time - self._first) // self.every + 1))
        return self.target if ended == self.rounds else 1 - (1 - self.target) ** (ended / self.rounds)


def _check(name: str, target: float, begin: int, every: int, unit: str) -> None:
    if not 0 < target < 1:
        raise ValueError(
            f"{name}: target is the final fraction of weights removed and must lie in (0, 1), got {target}. "
            "For 90 % write 0.9."
        )
    if not isinstance(begin, int) or not isinstance(every, int) or begin < 0 or every < 1:
        raise ValueError(f"{name}: begin and every are whole numbers, at least 0 and 1, got {begin} and {every}")
    if unit not in ("step", "epoch"):
        raise ValueError(f'{name}: unit must be "step" or "epoch", got {unit!r}')


def check_schedule(name: str, schedule: object) -> None:
    """Raises ValueError, in the name of a callback, for a value that is no schedule."""
    missing = [part for part in ("target", "unit", "changes", "__call__") if not hasattr(schedule, part)]
    if missing:
        raise ValueError(
            f"{name} takes a schedule such as CubicSchedule(0.8, 0, 1000), or one with target, unit, changes and a "
            f"call; {type(schedule).__name__} lacks {', '.join(missing)}"
        )
    if getattr(schedule, "unit", None) not in ("step", "epoch"):
        raise ValueError(f'{name}: the schedule\'s unit must be "step" or "epoch", got {schedule.unit!r}')  # type: ignore[attr-defined]
