"""Schedules against their formulas, in exact fractions where that is possible; the selection over a dict of scores."""

import doctest
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_callbacks.sparsity import (
    ConstantSchedule,
    CubicSchedule,
    IMPSchedule,
    LinearSchedule,
    keep_largest,
    keep_largest_of_all,
    schedules,
)


def test_doctests():
    tried = doctest.testmod(schedules)
    assert tried.failed == 0
    assert tried.attempted >= 6


@pytest.mark.parametrize(("kind", "power"), [(LinearSchedule, 1), (CubicSchedule, 3)])
@pytest.mark.parametrize("initial", [0.0, 0.25])
def test_ramps_follow_their_formula(kind, power, initial):
    schedule = kind(0.75, begin=20, end=100, every=16, initial=initial)
    start, target = Fraction(initial), Fraction(3, 4)
    for time in range(130):
        x = Fraction(min(80, (time - 20) // 16 * 16), 80)
        expected = target + (start - target) * (1 - x) ** power if time >= 20 else 0
        assert schedule(time) == pytest.approx(float(expected), abs=1e-15)
    assert schedule(100) == schedule(10**9) == 0.75


@pytest.mark.parametrize("begin", [None, 100])
def test_imp_keeps_the_same_share_in_every_round(begin):
    schedule = IMPSchedule(0.9, rounds=10, every=70, begin=begin)
    first = begin or 70
    for r in range(1, 11):
        end = first + (r - 1) * 70
        assert schedule(end) == pytest.approx(1 - 0.1 ** (r / 10), abs=1e-15)
        assert schedule(end - 1) == pytest.approx(1 - 0.1 ** ((r - 1) / 10), abs=1e-15)
    assert schedule(first - 1) == 0.0
    assert schedule(10**6) == schedule.target == 0.9
    assert list(schedule.changes) == [first + 70 * r for r in range(10)]


ramps = st.builds(
    lambda kind, target, begin, every, n, initial: kind(target, begin, begin + n * every, every, initial * target),
    st.sampled_from([LinearSchedule, CubicSchedule]),
    st.floats(0.01, 0.99),
    st.integers(0, 20),
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.3]),
)
rounds = st.builds(IMPSchedule, st.floats(0.01, 0.99), st.integers(1, 12), st.integers(1, 9), st.integers(0, 9))
constants = st.builds(ConstantSchedule, st.floats(0.01, 0.99), st.integers(0, 20))


@given(ramps | rounds | constants)
def test_every_schedule_rises_at_its_changes_and_nowhere_else(schedule):
    values = [schedule(time) for time in range(schedule.changes[-1] + 3)]
    rises = [t for t, value in enumerate(values) if value > (values[t - 1] if t else 0)]
    assert rises == list(schedule.changes)
    assert values == sorted(values)
    assert values[-1] == schedule.target


def test_schedules_that_cannot_be_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"LinearSchedule: the sparsity must rise.*got initial=0.8, target=0.5"):
        LinearSchedule(0.5, 0, 10, initial=0.8)
    with pytest.raises(ValueError, match="CubicSchedule: the sparsity must rise"):
        CubicSchedule(0.5, 0, 10, initial=0.5)
    with pytest.raises(ValueError, match=r"end must lie a multiple of every=3 after begin=0, got 10"):
        CubicSchedule(0.5, 0, 10, every=3)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got 90. For 90 % write 0.9"):
        IMPSchedule(90, 10, 5)
    with pytest.raises(ValueError, match="rounds is a whole number, at least 1, got 0"):
        IMPSchedule(0.9, 0, 5)
    with pytest.raises(ValueError, match='unit must be "step" or "epoch", got \'batch\''):
        ConstantSchedule(0.5, unit="batch")
    with pytest.raises(ValueError, match="begin and every are whole numbers, at least 0 and 1, got 3 and 0"):
        IMPSchedule(0.9, 2, 0, begin=3)
    with pytest.raises(ValueError, match="whole numbers, at least 0 and 1, got 1.5 and 1.5"):
        IMPSchedule(0.9, 2, 1.5)


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.booleans())
def test_one_selection_over_many_tensors_is_that_of_their_concatenation(data, dtype, coarse):
    """Against a stable sort in numpy: ties, signs, infinities, tensors without elements."""
    shapes = data.draw(st.lists(st.sampled_from([(3, 5), (1, 1), (7,), (0, 4), (2, 3, 2)]), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = {}
    for i, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = (values * 2).round() / 2 if coarse else values
        if values.numel() > 4:
            values.flatten()[2], values.flatten()[3], values.flatten()[4] = -torch.inf, -0.0, 0.0
        scores[f"layer{i}"] = values.to(dtype)
    flat = torch.cat([values.flatten() for values in scores.values()])
    kept = data.draw(st.integers(-1, len(flat) + 1))
    order = np.argsort(-(flat.double().numpy() + 0.0), kind="stable")[: max(0, kept)]
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[torch.from_numpy(order)] = True
    masks = dict(keep_largest_of_all(scores, kept))
    assert torch.equal(torch.cat([masks[name].flatten() for name in scores]), expected)
    assert torch.equal(keep_largest(flat + 0, kept), expected)
    assert {name: keep.shape for name, keep in masks.items()} == {n: v.shape for n, v in scores.items()}


def test_tensors_of_different_dtypes_are_compared_as_numbers():
    scores = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0, 1.0 + 2**-40], dtype=torch.float64)}
    masks = dict(keep_largest_of_all(scores, 3))
    assert masks["a"].tolist() == [False, True]
    assert masks["b"].tolist() == [True, True]


def test_nan_is_refused_by_name():
    with pytest.raises(ValueError, match="bad: scores contain NaN"):
        list(keep_largest_of_all({"good": torch.ones(3), "bad": torch.tensor([torch.nan])}, 1))
