import dataclasses

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prune_callbacks import NM, Block, Columns, Rows, Unstructured
from prune_callbacks.sparsity.selection import keep_largest

CASES = [
    (Unstructured(0.5), "tensor", {"sparsity": 0.5}),
    (Unstructured(0.3, per="tensor"), "tensor", {"sparsity": 0.3}),
    (Unstructured(0.7, per="row"), "row", {"sparsity": 0.7}),
    (Unstructured(0.0), "tensor", {"sparsity": 0.0}),
    (NM(2, 4), "nm", {"n": 2, "m": 4}),
    (NM(1, 4), "nm", {"n": 1, "m": 4}),
    (NM(4, 8), "nm", {"n": 4, "m": 8}),
    (Block(4, 0.5), "block", {"size": 4, "sparsity": 0.5}),
    (Rows(0.4), "rows", {"sparsity": 0.4}),
    (Columns(0.25), "columns", {"sparsity": 0.25}),
]
IDS = [str(case[0]) for case in CASES]


@pytest.mark.parametrize(("pattern", "kind", "given_settings"), CASES, ids=IDS)
@pytest.mark.parametrize("ties", [False, True])
def test_keep_equals_sorting(pattern, kind, given_settings, ties):
    scores = torch.randint(0, 4, (12, 24)).float() if ties else torch.rand(12, 24)
    keep = pattern.keep(scores)
    assert torch.equal(keep, oracles.pattern_mask(scores, kind, **given_settings))
    assert pattern.holds(keep)
    assert not pattern.holds(torch.ones_like(keep)) or pattern.sparsity == 0


def test_nm_counts_what_is_kept():
    assert NM(2, 4).sparsity == 0.5
    assert NM(1, 4).sparsity == 0.75
    scores = torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4]])
    assert NM(1, 4).keep(scores).tolist() == [[True, False, False, False, False, False, False, True]]


def test_equal_scores_keep_the_first():
    equal = torch.ones(2, 8)
    assert NM(2, 4).keep(equal)[0].tolist() == [True, True, False, False] * 2
    assert Unstructured(0.5, per="row").keep(equal)[1].tolist() == [True] * 4 + [False] * 4
    assert Unstructured(0.5).keep(equal).flatten().tolist() == [True] * 8 + [False] * 8
    assert Rows(0.5).keep(equal)[:, 0].tolist() == [True, False]
    assert Columns(0.5).keep(equal)[0].tolist() == [True] * 4 + [False] * 4


@given(
    hnp.arrays("float32", st.tuples(st.integers(1, 6), st.integers(1, 30)), elements=st.integers(-3, 3)),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_keep_largest_equals_sorting_for_any_scores(array, data):
    scores = torch.from_numpy(array)
    kept = data.draw(st.integers(0, scores.shape[1]))
    expected = [oracles.keep_by_sorting(row, kept) for row in scores]
    assert keep_largest(scores, kept).tolist() == expected


@given(
    st.floats(0, 0.999), st.integers(1, 9), st.integers(1, 40), st.integers(1, 16), st.sampled_from(["row", "tensor"])
)
@settings(max_examples=100, deadline=None)
def test_slices_of_columns_add_up_to_the_count_of_the_layer(sparsity, out, size, step, per):
    pattern = Unstructured(sparsity, per=per)
    scores = torch.rand(out, size)
    slices = [pattern.keep(scores[:, a : a + step], start=a) for a in range(0, size, step)]
    total = torch.cat(slices, 1)
    assert int(total.sum()) == int(pattern.keep(scores).sum())
    if per == "row":
        assert set(total.sum(1).tolist()) == {size - round(sparsity * size)}


def test_infinite_scores_are_ordered_and_nan_is_refused():
    scores = torch.tensor([[float("inf"), 1.0, -float("inf"), 2.0]])
    assert Unstructured(0.5).keep(scores).tolist() == [[True, False, False, True]]
    scores[0, 1] = float("nan")
    for pattern in (Unstructured(0.5), NM(2, 4), Rows(0.5), Columns(0.5), Block(1, 0.5)):
        with pytest.raises(ValueError, match=r"scores contain NaN \(1 of 4\)"):
            pattern.keep(scores)


def test_half_precision_scores():
    for dtype in (torch.bfloat16, torch.float16):
        assert int(Unstructured(0.5).keep(torch.rand(6, 8, dtype=dtype)).sum()) == 24


@pytest.mark.parametrize("sparsity", [-0.1, 1, 50, float("nan")])
@pytest.mark.parametrize("make", [Unstructured, Rows, Columns, lambda s: Block(2, s)])
def test_sparsity_outside_its_range_is_refused(make, sparsity, unchecked):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got"):
        make(sparsity)


@pytest.mark.parametrize("arguments", [(4, 4), (5, 4), (0, 4), (-1, 2)])
def test_nm_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match=r"needs 0 < n < m, got NM\("):
        NM(*arguments)


def test_shapes_that_do_not_divide_are_refused(unchecked):
    with pytest.raises(ValueError, match="input size divisible by 4, got 6"):
        NM(2, 4).keep(torch.rand(3, 6))
    with pytest.raises(ValueError, match="both dimensions divisible by 4"):
        Block(4, 0.5).check_shape((8, 6))
    with pytest.raises(ValueError, match='per must be "row", "even", "tensor" or None'):
        Unstructured(0.5, per="column")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Block(0, 0.5)


def test_patterns_are_frozen_values():
    assert Unstructured(0.5) == Unstructured(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NM(2, 4).n = 3
