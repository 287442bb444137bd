"""Tries a pruner, a pattern or a schedule on random numbers, and raises an error for a broken promise."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from prune_callbacks.pruners import Pruned, Pruner, check_pruner
from prune_callbacks.pruners.protocol import check_pattern
from prune_callbacks.pruners.questions import coupled, joint, pool, takes_pattern, with_pattern
from prune_callbacks.solvers.statistics import Gram, Statistic
from prune_callbacks.sparsity import Pattern, Schedule
from prune_callbacks.sparsity.questions import at_sparsity, column_group, in_pool, removes_rows, removes_single_weights
from prune_callbacks.sparsity.schedules import check_schedule

SHAPES = ((16, 32), (8, 48), (24, 96))
TOKENS = 200


def check_contract(contender: Any, *, seed: int = 0, shapes: Sequence[tuple[int, int]] = SHAPES) -> None:
    """
    Checks that a pruner, a pattern or a schedule keeps the promises of its Protocol; call it in a test of your own.

    A pruner is run on random layers, of shapes that fit its pattern. Its arguments must stay unchanged. Removed weights
    must be zero, and the mask must have the pattern. NaN and empty statistics must be refused. Under a Gram, the loss
    must be `sum d G d^T`. A second call and, for a joint pruner, layers solved together must give the same result. The
    `repr` must be equal for a copy and hold no address, so that every process writes the same one.

    A pattern must make masks of random, tied and NaN scores and of slices of columns, and give itself at another
    sparsity. A schedule is called at every time from 0 to one past its last change.

    Args:
        contender: the pruner, pattern or schedule.
        seed: the seed of the random numbers. The global random state is restored afterwards.
        shapes: (out, in) of the random layers; shapes that do not fit the pattern are skipped.

    Raises:
        ValueError: a promise is broken, or `contender` is none of the three; the message names the finding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(contender, "prune") or hasattr(contender, "statistic"):
            _check_pruner(contender, shapes)
        elif hasattr(contender, "keep"):
            _check_pattern(contender, shapes)
        elif hasattr(contender, "changes"):
            _check_schedule(contender)
        else:
            raise ValueError(
                f"check_contract takes a pruner (with prune and statistic), a pattern (with keep) or a schedule (with "
                f"changes), got {contender!r}"
            )


def _require(holds: bool, contender: object, broken: str) -> None:
    """Raises ValueError with the broken promise unless it holds."""
    if not holds:
        raise ValueError(f"{contender!r} breaks its contract: {broken}")


def _refuses(call: Callable[[], object]) -> bool:
    """Returns whether a call raises ValueError."""
    try:
        call()
    except ValueError:
        return True
    return False


def _fitting(pattern: Pattern, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the shapes that fit the pattern."""
    for shape in shapes:
        with suppress(ValueError):
            pattern.check_shape(shape)
            yield shape


def _check_pruner(pruner: Pruner, drawn: Sequence[tuple[int, int]]) -> None:
    """Checks a pruner and its pattern on layers of the given shapes."""
    check_pruner("check_contract", pruner)
    _check_pattern(pruner.pattern, drawn)
    _require(" at 0x" not in repr(pruner), pruner, "its repr holds an address, which differs between processes")
    _require(repr(copy.deepcopy(pruner)) == repr(pruner), pruner, "a copy has another repr")
    if takes_pattern(pruner):
        again = with_pattern(pruner, pruner.pattern)
        _require(repr(again) == repr(pruner), pruner, f"with its own pattern it becomes {again!r}")
    shapes = list(_fitting(pruner.pattern, drawn))
    for shape in shapes:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            weight = torch.randn(shape).to(dtype)
            _check_pruned(pruner, weight, _filled(pruner, shape[1]))
    weight = torch.randn(shapes[0])
    weight[1, 2] = torch.nan
    statistic = _filled(pruner, shapes[0][1])
    _require(_refuses(lambda: pruner.prune(weight, statistic)), pruner, "it takes a weight with NaN")
    empty = pruner.statistic(shapes[0][1], "cpu")
    if empty is not None:
        weight = torch.randn(shapes[0])
        _require(_refuses(lambda: pruner.prune(weight, empty)), pruner, "it takes statistics of no token")
        _require(_refuses(lambda: pruner.prune(weight, None)), pruner, "it takes None for the statistics it asks for")


def _filled(pruner: Pruner, in_features: int) -> Statistic | None:
    """Returns the pruner's statistic, filled with random inputs in which one feature is always zero."""
    statistic = pruner.statistic(in_features, "cpu")
    if statistic is not None:
        _require(isinstance(statistic, Statistic), pruner, f"{statistic!r} is no Statistic")
        inputs = torch.randn(2, TOKENS // 2, in_features) * torch.rand(in_features).add(0.1)
        inputs[..., 3] = 0
        statistic.update(inputs)
        _require(statistic.tokens == TOKENS, pruner, f"its statistic counts {statistic.tokens} of {TOKENS} tokens")
    return statistic


def _check_pruned(pruner: Pruner, weight: Tensor, statistic: Statistic | None) -> None:
    """Checks the result of pruning one layer."""
    before, known = weight.clone(), copy.deepcopy(statistic)
    pruned = pruner.prune(weight, statistic)
    _require(torch.equal(weight, before), pruner, "prune changes the weight that it is given")
    if statistic is not None and known is not None:
        tensors = ((vars(known)[name], value) for name, value in vars(statistic).items() if isinstance(value, Tensor))
        same = torch.equal(statistic.squared_norm, known.squared_norm) and statistic.tokens == known.tokens
        _require(
            same and all(torch.equal(*pair) for pair in tensors), pruner, "prune changes the statistic that it is given"
        )
    result, keep = pruned.weight, pruned.keep
    told = f"{tuple(result.shape)}, {result.dtype} for {tuple(weight.shape)}, {weight.dtype}"
    _require(result.shape == weight.shape and result.dtype == weight.dtype, pruner, f"the new weight is {told}")
    _require(keep.shape == weight.shape and keep.dtype == torch.bool, pruner, "keep is no bool mask of the shape")
    _require(not bool(result[~keep].any()), pruner, "weights that keep removes are not zero")
    pattern = in_pool(pruner.pattern, pool(pruner))
    _require(coupled(pruner) is not None or pruner.pattern.holds(keep), pruner, "the mask does not have its pattern")
    if removes_single_weights(pattern) and getattr(pattern, "per", None) == "row":
        counts = keep.sum(1)
        _require(int(counts.min()) == int(counts.max()), pruner, 'its pool is "row", and rows keep different counts')
    _check_loss(pruner, weight, pruned, statistic)
    again = pruner.prune(weight, statistic)
    _require(torch.equal(again.weight, result), pruner, "two calls give different weights")
    together = joint(pruner)
    if together is not None:
        both = together.prune_together([weight, weight.flip(0)], statistic)
        close = torch.allclose(both[0].weight.float(), result.float(), rtol=1e-2, atol=1e-2)
        _require(len(both) == 2 and close, pruner, "prune_together differs from prune")


def _check_loss(pruner: Pruner, weight: Tensor, pruned: Pruned, statistic: Statistic | None) -> None:
    """Checks the reported loss against `sum d G d^T`, if the statistic is a Gram."""
    if not isinstance(statistic, Gram):
        return
    change, gram = pruned.weight.double() - weight.double(), statistic.matrix.double()
    expected = float((change @ gram * change).sum())
    found = pruned.loss
    near = found is not None and abs(found - expected) <= 1e-3 * expected + 1e-5 * float(gram.diagonal().mean())
    _require(near, pruner, f"the loss is {found}, and d G d^T is {expected}")


def _check_pattern(pattern: Pattern, drawn: Sequence[tuple[int, int]]) -> None:
    """Checks a pattern on scores of the given shapes."""
    check_pattern("check_contract", pattern)
    _require(0 <= pattern.sparsity < 1, pattern, f"its sparsity, {pattern.sparsity}, is not in [0, 1)")
    shapes = list(_fitting(pattern, drawn))
    _require(bool(shapes), pattern, f"check_shape refuses all of {list(drawn)}; give others with shapes=")
    for shape in shapes:
        scores = torch.randn(shape).abs()
        keep = pattern.keep(scores)
        _require(keep.shape == scores.shape and keep.dtype == torch.bool, pattern, "keep returns no bool mask")
        _require(pattern.holds(keep), pattern, "holds says no to a mask that keep made")
        _require(torch.equal(pattern.keep(scores.clone()), keep), pattern, "keep differs between two calls")
        more = pattern.keep(scores + scores.max() * keep)
        _require(torch.equal(more, keep), pattern, "keep does not take the largest scores")
        falling = torch.linspace(2, 1, scores.numel(), dtype=torch.float64).view(shape)
        tied = pattern.keep(torch.ones(shape))
        _require(
            torch.equal(tied, pattern.keep(falling)),
            pattern,
            "of equal scores it does not keep the first; `keep_largest` does",
        )
        scores[1, 2] = torch.nan
        _require(_refuses(lambda s=scores: pattern.keep(s)), pattern, "keep takes NaN; begin with refuse_nan(scores)")  # type: ignore[misc]
        _check_slices(pattern, torch.randn(shape).abs(), int(keep.sum()))
        _require(
            float(keep.float().mean()) > 0.9 or not pattern.holds(torch.ones_like(keep)),
            pattern,
            "holds takes any mask",
        )
        emptied = not bool(keep.any(1).all()) and bool((keep.any(1) == keep.all(1)).all())
        _require(not emptied or removes_rows(pattern), pattern, "it removes whole rows; say so by removes_rows = True")
    with suppress(ValueError):  # a pattern may have one sparsity only
        sparser = at_sparsity(pattern, (1 + pattern.sparsity) / 2)
        scores = torch.randn(shapes[0]).abs()
        fewer = int(sparser.keep(scores).sum()) <= int(pattern.keep(scores).sum())
        _require(fewer, pattern, f"{sparser!r}, which is sparser, keeps more")


def _check_slices(pattern: Pattern, scores: Tensor, kept: int) -> None:
    """Checks that the counts of consecutive slices of columns add up, unless the pattern declares `removes_rows`."""
    width = column_group(pattern) * max(1, scores.shape[1] // column_group(pattern) // 4)
    if not removes_rows(pattern):
        try:
            parts = [pattern.keep(part, start=i * width) for i, part in enumerate(scores.split(width, 1))]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{pattern!r} breaks its contract: keep fails on a slice of {width} columns ({error}); if neighbouring "
                "columns belong together, say how many by the attribute column_group"
            ) from error
        total = sum(int(part.sum()) for part in parts)
        remedy = "count by removed_units(sparsity, total, before)"
        _require(total == kept, pattern, f"slices of {width} columns keep {total} weights, the whole {kept}; {remedy}")


def _check_schedule(schedule: Schedule) -> None:
    """Checks a schedule at every time from 0 to one past its last change."""
    check_schedule("check_contract", schedule)
    changes = list(schedule.changes)
    _require(bool(changes) and changes == sorted(set(changes)), schedule, f"its changes, {changes}, do not ascend")
    before, times = 0.0, set(changes)
    for time in range(changes[-1] + 2):
        now = schedule(time)
        _require(0 <= now <= schedule.target < 1, schedule, f"at {time} it is {now}, not in [0, target < 1]")
        moved = now != before
        if moved != (time in times):  # the text of a long schedule's changes takes longer than all of the checks
            _require(False, schedule, f"it goes from {before} to {now} at {time}; changes={changes}")
        _require(now >= before, schedule, f"it falls at {time}")
        before = now
    _require(before == schedule.target, schedule, f"it ends at {before}, and its target is {schedule.target}")
