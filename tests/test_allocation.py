"""Sparsity spread over layers: totals exact to one weight, against linear programs, brute force and formulas."""

import copy
import itertools
import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from prune_callbacks import (
    ALPS,
    GPTQ,
    MRP,
    NM,
    OWL,
    Columns,
    LagrangianAllocation,
    Magnitude,
    OneShotPrune,
    SensitivityAllocation,
    SparseGPT,
    Structured,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.allocation.counts import by_losses, by_outliers, by_sensitivity, mix_of_groups

SIZES = st.lists(st.integers(50, 5000), min_size=1, max_size=8).map(
    lambda sizes: {f"l{i}": n for i, n in enumerate(sizes)}
)


@given(SIZES, st.floats(0.05, 0.9), st.data())
@settings(max_examples=100, deadline=None)
def test_every_rule_meets_the_total_to_one_weight(sizes, target, data):
    values = {name: data.draw(st.floats(0, 100)) for name in sizes}
    wanted = round(target * sum(sizes.values()))
    values[next(iter(values))] += 1.0  # one is sensitive
    low, high = 0.5 * target, min(0.99, 1.3 * target)
    removed = by_sensitivity(values, sizes, target, low, high)
    assert sum(removed.values()) == wanted
    assert all(math.floor(low * n) <= removed[name] <= math.ceil(high * n) for name, n in sizes.items())
    reach = min(target, 1 - target) / 2.01
    removed = by_outliers(values, sizes, target, reach)
    assert sum(removed.values()) == wanted
    curves = {
        name: [(x * target, values[name] * x**2), (target, values[name]), (0.95, 3 * values[name])]
        for name, x in zip(sizes, itertools.cycle([0.2, 0.5, 0.9]), strict=False)
    }
    removed = by_losses(curves, sizes, target)
    assert sum(removed.values()) == wanted
    assert all(curves[n][0][0] * sizes[n] - 1 < count < 0.95 * sizes[n] + 1 for n, count in removed.items())


def test_sensitivities_in_inverse_proportion_and_where_a_second_clamp_would_miss():
    sizes = {"a": 1000, "b": 1000, "c": 2000}
    removed = by_sensitivity({"a": 1.0, "b": 2.0, "c": 4.0}, sizes, 0.2)
    assert removed["a"] == pytest.approx(2 * removed["b"], abs=2)
    assert removed["b"] / 1000 == pytest.approx(2 * removed["c"] / 2000, abs=2e-3)
    # The usual listing: scale to the target, clip, scale again, clip again.
    sensitivity = {"a": 0.01, "b": 5.0, "c": 9.0}
    inverse = torch.tensor([1 / s for s in sensitivity.values()], dtype=torch.float64)
    weights = torch.tensor(list(sizes.values()), dtype=torch.float64)
    listing = inverse * 0.5
    for _ in range(2):
        listing = (listing * 0.5 * weights.sum() / (listing * weights).sum()).clamp(0.1, 0.9)
    assert abs(float((listing * weights).sum()) - 2000) > 100
    assert sum(by_sensitivity(sensitivity, sizes, 0.5, 0.1, 0.9).values()) == 2000


def test_layers_that_pruning_helped_count_as_hardly_sensitive():
    removed = by_sensitivity({"a": -3.0, "b": 1.0, "c": 1.0}, dict.fromkeys("abc", 1000), 0.5, 0.1, 0.9)
    assert removed == {"a": 900, "b": 300, "c": 300}


def test_owl_is_the_papers_formula():
    ratios, sizes = {"a": 0.01, "b": 0.03, "c": 0.02}, dict.fromkeys("abc", 10_000)
    removed = by_outliers(ratios, sizes, 0.6, 0.08)
    stretched = {name: (ratio - 0.01) / 0.02 * 2 * 0.08 for name, ratio in ratios.items()}
    mean = sum(stretched.values()) / 3
    assert removed == {name: round((0.6 - (s - mean)) * 10_000) for name, s in stretched.items()}
    assert by_outliers(dict.fromkeys("abc", 0.5), sizes, 0.6, 0.08) == dict.fromkeys("abc", 6000)


@given(SIZES, st.data())
@settings(max_examples=60, deadline=None)
def test_losses_are_the_least_that_a_linear_program_finds(sizes, data):
    curves = {}
    for name in sizes:
        xs = sorted(data.draw(st.sets(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]), min_size=3)) | {0.0})
        steps = data.draw(st.lists(st.floats(0, 5), min_size=len(xs), max_size=len(xs)))
        curves[name] = list(zip(xs, itertools.accumulate(steps), strict=True))
    total, target = sum(sizes.values()), 0.25
    top = sum(curves[n][-1][0] * sizes[n] for n in sizes) / total
    if top < target:
        with pytest.raises(ValueError, match="measure losses at higher sparsities"):
            by_losses(curves, sizes, target)
        return
    removed = by_losses(curves, sizes, target)
    # Every layer is a mixture of its points.
    places = [(n, s, loss) for n in sizes for s, loss in curves[n]]
    solved = linprog(
        [loss for _, _, loss in places],
        A_eq=[[float(n == layer) for n, _, _ in places] for layer in sizes]
        + [[s * sizes[n] / total for n, s, _ in places]],
        b_eq=[1.0] * len(sizes) + [round(target * total) / total],
    )

    def least(name, share):  # on the hull: the least mixture of two points
        pairs = [(p, q) for p in curves[name] for q in curves[name] if p[0] <= share <= q[0]]
        at = [p[1] if p[0] == q[0] else p[1] + (q[1] - p[1]) * (share - p[0]) / (q[0] - p[0]) for p, q in pairs]
        return min(at)

    slope = max(abs(b[1] - a[1]) / (b[0] - a[0]) / sizes[n] for n in sizes for a, b in itertools.pairwise(curves[n]))
    found = sum(least(name, min(count / sizes[name], curves[name][-1][0])) for name, count in removed.items())
    assert found <= solved.fun + 1e-6 + 2 * len(sizes) * slope  # whole weights
    assert found >= solved.fun - 1e-6 - 2 * len(sizes) * slope


def test_mixes_of_groups_against_every_mix():
    generator = torch.Generator().manual_seed(3)
    sizes = {"a": 400, "b": 800, "c": 400, "d": 1200}
    draw = lambda: torch.rand(3, generator=generator).cumsum(0).flip(0).tolist()  # noqa: E731
    losses = {name: dict(zip((1, 2, 3), draw(), strict=True)) for name in sizes}
    found = mix_of_groups(losses, sizes, 4, 0.5)
    gone = lambda mix: sum(sizes[n] * (4 - k) // 4 for n, k in mix.items())  # noqa: E731
    mixes = [dict(zip(sizes, ks, strict=True)) for ks in itertools.product((1, 2, 3), repeat=4)]
    best = min(sum(losses[n][k] for n, k in mix.items()) for mix in mixes if gone(mix) >= 1400)
    assert gone(found) >= 1400
    assert sum(losses[n][k] for n, k in found.items()) <= best * 1.001
    with pytest.raises(ValueError, match="no mix of these N:4 patterns removes 90.00% of all weights"):
        mix_of_groups(losses, sizes, 4, 0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by_sensitivity({"a": 1.0}, {"a": 5, "b": 5}, 0.5), "a value for every layer.*b has none"),
        (lambda: by_sensitivity({"a": math.nan}, {"a": 5}, 0.5), "the value of a, nan, is not a finite number"),
        (lambda: by_sensitivity({"a": 0.0}, {"a": 5}, 0.5), "no layer is sensitive"),
        (
            lambda: by_sensitivity({"a": 1.0}, {"a": 5}, 0.5, 0.6, 0.9),
            r"bounds \[0.6, 0.9\] must .* hold the target, 0.5",
        ),
        (lambda: by_sensitivity({}, {}, 0.5), "no layers"),
        (lambda: by_outliers({"a": 1.0}, {"a": 5}, 0.9, 0.08), r"OWL: with a reach of 0.08, sparsities around 0.9"),
        (lambda: by_outliers({"a": 1.0}, {"a": 5}, 1.5), "the target is the fraction"),
        (lambda: by_losses({"a": [(0.6, 1.0)]}, {"a": 5}, 0.2), "measure losses at lower sparsities"),
    ],
)
def test_what_cannot_be_allocated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(st.integers(1, 9), st.integers(2, 12), st.floats(0, 0.9))
@settings(max_examples=100, deadline=None)
def test_even_rows_lose_the_same_count_up_to_one(rows, columns, sparsity):
    scores = torch.randint(0, 4, (rows, columns)).float()  # with ties
    pattern = Unstructured(sparsity, per="even")
    keep = pattern.keep(scores)
    gone = (~keep).sum(1)
    assert int(gone.sum()) == round(sparsity * (rows * columns))
    assert int(gone.max() - gone.min()) <= 1
    assert pattern.holds(keep)
    for row, mask in zip(scores, keep, strict=True):  # of every row the least go
        assert not (~mask).any() or not mask.any() or row[~mask].max() <= row[mask].min()
    if int(gone.max()) != int(gone.min()):  # and of their next ones the least
        more, fewer = gone == gone.max(), gone == gone.min()
        last = torch.stack([row[~mask].max() for row, mask in zip(scores[more], keep[more], strict=True)])
        next_one = torch.stack([row[mask].min() for row, mask in zip(scores[fewer], keep[fewer], strict=True)])
        assert last.max() <= next_one.min()
    halves = torch.cat([pattern.keep(scores[:, :1]), pattern.keep(scores[:, 1:], start=1)], 1)
    assert int((~halves).sum()) == round(sparsity * (rows * columns))


def test_a_mask_of_uneven_rows_is_not_even():
    keep = torch.tensor([[True, True, True, False], [False, False, False, False]])
    assert Unstructured(0.5, per="tensor").holds(keep)
    assert not Unstructured(0.5, per="even").holds(keep)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (4, 64), generator=generator) for _ in range(4)]


def total(report):
    return sum(math.prod(layer.shape) for layer in report.layers)


PRUNERS = [kind(Unstructured(0.6)) for kind in (Magnitude, Wanda, SparseGPT, MRP, ALPS)]


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("allocation", [OWL(), LagrangianAllocation()], ids=lambda a: type(a).__name__)
def test_every_method_meets_the_total_and_layers_differ(tiny, batches, pruner, allocation):
    report = prune_sequentially(tiny, batches, pruner, allocation=allocation, progress=False)
    removed = sum(int((~keep).sum()) for keep in report.masks.values())
    assert removed == round(0.6 * total(report))
    spread = [layer.sparsity for layer in report.layers]
    assert max(spread) - min(spread) > 0.05
    assert max(spread) - min(spread) <= (0.165 if isinstance(allocation, OWL) else 0.3001)
    assert report.masks.violations(tiny.named_parameters()) == {}


@pytest.mark.parametrize(
    "pruner", [Wanda(Unstructured(0.5)), SparseGPT(Unstructured(0.5)), Magnitude(Unstructured(0.5))]
)
def test_equal_sensitivities_are_uniform_pruning(tiny, batches, pruner):
    from prune_callbacks.tasks import tiny_llama

    even = SensitivityAllocation(dict.fromkeys(prune_sequentially(tiny, batches, pruner, progress=False).masks, 1.0))
    even = SensitivityAllocation({name.removesuffix(".weight"): 1.0 for name in even.sensitivity})
    other = tiny_llama(hidden_size=32, layers=2)
    report = prune_sequentially(other, batches, pruner, allocation=even, progress=False)
    assert {layer.sparsity for layer in report.layers} == {0.5}
    for name, weight in tiny.state_dict().items():
        assert torch.allclose(weight, other.state_dict()[name], atol=1e-6), name


def test_outliers_are_those_of_the_dense_model(tiny, batches):
    """Wanda scores of a whole block against five times their mean, from the model run as a whole."""
    inputs = {}
    layers = {n: m for n, m in tiny.named_modules() if n.startswith("model.layers") and isinstance(m, torch.nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, []).append(args[0]))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            tiny(input_ids=batch)
    for hook in hooks:
        hook.remove()
    ratios = {}
    for block in range(2):
        mine = {n: m for n, m in layers.items() if n.startswith(f"model.layers.{block}.")}
        scores = torch.cat(
            [
                (m.weight.detach().double().abs() * torch.cat(inputs[n]).double().flatten(0, 1).norm(dim=0)).flatten()
                for n, m in mine.items()
            ]
        )
        ratios |= dict.fromkeys(mine, float((scores > 2 * scores.mean()).double().mean()))
    sizes = {n: m.weight.numel() for n, m in layers.items()}
    wanted = by_outliers(ratios, sizes, 0.6, 0.05)
    report = prune_sequentially(
        tiny, batches, Magnitude(Unstructured(0.6)), allocation=OWL(threshold=2.0, reach=0.05), progress=False
    )
    removed = {
        layer.name.removesuffix(".weight"): round(layer.sparsity * sizes[layer.name.removesuffix(".weight")])
        for layer in report.layers
    }
    assert removed == wanted
    assert len(set(ratios.values())) == 2


def test_lagrangian_lowers_the_sum_of_relative_losses(batches):
    from prune_callbacks.tasks import tiny_llama

    def lost(allocation):
        report = prune_sequentially(
            tiny_llama(hidden_size=32, layers=1),
            batches,
            SparseGPT(Unstructured(0.6)),
            allocation=allocation,
            progress=False,
        )
        return sum(layer.relative_loss for layer in report.layers)

    assert lost(LagrangianAllocation(reach=0.3, points=4)) < 0.9 * lost(None)


def test_nm_patterns_are_mixed(tiny, batches):
    report = prune_sequentially(tiny, batches, Wanda(NM(2, 4)), allocation=LagrangianAllocation(), progress=False)
    assert {layer.sparsity for layer in report.layers} == {0.25, 0.5, 0.75} or len(
        {x.sparsity for x in report.layers}
    ) == 2
    assert report.sparsity >= 0.5
    for layer in report.layers:
        assert NM(round(4 * (1 - layer.sparsity)), 4).holds(report.masks[layer.name])


@pytest.mark.parametrize(
    ("pruner", "allocation", "message"),
    [
        (Wanda(NM(2, 4)), OWL(), r"OWL spreads the sparsity of Unstructured over layers and cannot spread NM"),
        (Structured(Columns(0.25)), LagrangianAllocation(), "cannot spread Columns"),
        (GPTQ(), OWL(), "GPTQ takes its masks as they are"),
        (Wanda(Unstructured(0.95)), OWL(), "would leave"),
        (Wanda(Unstructured(0.5)), {"a": 0.5}, "allocation is None or one such as OWL"),
        (Wanda(Unstructured(0.5)), SensitivityAllocation({"a": 1.0}), "a value for every layer"),
    ],
)
def test_bad_allocations_are_refused_before_any_work(tiny, batches, pruner, allocation, message, unchecked):
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_sequentially(tiny, batches, pruner, allocation=allocation, progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.state_dict().items())
    if not isinstance(allocation, SensitivityAllocation):
        with pytest.raises(ValueError, match=message):
            OneShotPrune(pruner, allocation=allocation)


def test_lagrangian_settings():
    with pytest.raises(ValueError, match=r"reach must lie in \(0, 1\) and points be 1 or more, got 0.0 and 3"):
        LagrangianAllocation(reach=0.0)


@dataclass(frozen=True)
class RowByRow:
    """A user's pruner, which chooses in every row."""

    pattern: Unstructured

    def statistic(self, in_features, device=None):
        return None

    def prune(self, weight, statistic):
        pattern = self.pattern if self.pattern.per else replace(self.pattern, per="row")
        return Magnitude(pattern).prune(weight)


class SaysSo(RowByRow):
    pool = "row"


def test_a_users_pruner_that_chooses_row_by_row_meets_the_total_or_is_named(tiny):
    """37 % of rows of 32 or 96 are no whole counts: rounded row by row, every layer misses its own."""
    names = prune_sequentially(copy.deepcopy(tiny), None, Magnitude(Unstructured(0.5)), progress=False).masks
    allocation = SensitivityAllocation({name.removesuffix(".weight"): 1.0 + i for i, name in enumerate(names)})
    size = sum(tiny.get_parameter(name).numel() for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prune_sequentially(
            copy.deepcopy(tiny), None, SaysSo(Unstructured(0.37)), allocation=allocation, progress=False
        )
    assert abs(round(report.sparsity * size) - 0.37 * size) <= 1
    with pytest.warns(UserWarning, match=r"was allocated \d+ zeros and RowByRow made \d+; .* pool = \"row\""):
        report = prune_sequentially(
            copy.deepcopy(tiny), None, RowByRow(Unstructured(0.37)), allocation=allocation, progress=False
        )
    assert abs(round(report.sparsity * size) - 0.37 * size) > 1
