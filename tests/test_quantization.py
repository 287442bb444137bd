"""Rounding: grids, GPTQ's sweep, SparseGPT and rounding in one, and what the engine reports."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_callbacks import (
    ALPS,
    GPTQ,
    MRP,
    NM,
    Columns,
    Gram,
    Grid,
    Magnitude,
    PruneReport,
    SparseGPT,
    SparseGPTQ,
    Structured,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.pruners import joint as stacked
from prune_callbacks.solvers.gptq import CLIPS, round_to_nearest
from prune_callbacks.tasks import tiny_llama

OUT, IN = 6, 24
SHARES = CLIPS.tolist()


@pytest.fixture
def layer(correlated):
    x = correlated(IN)
    gram = Gram(IN)
    gram.update(x)
    return torch.randn(OUT, IN, dtype=torch.float64), x, gram


@pytest.mark.parametrize("block_size", [8, 12, 128])
@pytest.mark.parametrize("group", [8, 12, 16, None])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), Unstructured(0.5, per="row")], ids=str)
def test_joint_equals_obs_with_a_fresh_inverse_for_every_column(layer, pattern, group, block_size):
    weight, x, gram = layer
    grid = Grid(4, group)
    pruned = SparseGPTQ(pattern, grid, block_size=block_size).prune(weight, gram)
    width = grid.width(IN)
    step = pattern.m if isinstance(pattern, NM) else min(IN, blocks_of(block_size, width))
    solved, keep, scale = oracles.gptq_obs(weight, x, 0.01, step, pattern.keep, width, grid.largest, SHARES)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.scale.double(), scale, rtol=0, atol=0)
    torch.testing.assert_close(pruned.weight, solved, rtol=1e-9, atol=1e-9)
    assert pruned.loss == pytest.approx(oracles.output_error(weight, pruned.weight, x))


def blocks_of(block_size, width):
    """A block holds whole groups, or is one."""
    return block_size // width * width if width <= block_size else block_size if width % block_size == 0 else width


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_a_pruner_it_is_gptq_and_zeros_stay(layer, bits):
    weight, x, gram = layer
    weight = weight * Magnitude(Unstructured(0.3)).prune(weight).keep
    grid = Grid(bits, 8)
    pruned = GPTQ(grid=grid, damping=0.05).prune(weight, gram)
    nonzero = weight != 0
    choose = lambda scores, start: nonzero[:, start : start + scores.shape[1]]  # noqa: E731
    solved, keep, scale = oracles.gptq_obs(weight, x, 0.05, IN, choose, 8, grid.largest, SHARES)
    assert torch.equal(pruned.keep, nonzero)
    assert torch.equal(keep, nonzero)
    seen = x.square().sum(0) > 0
    torch.testing.assert_close(pruned.weight[:, seen], solved[:, seen], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pruned.scale.double(), scale, rtol=0, atol=0)


@pytest.mark.parametrize(
    "pruner",
    [Magnitude(NM(2, 4)), Wanda(Unstructured(0.5)), SparseGPT(NM(1, 4)), MRP(Unstructured(0.6)), ALPS(Columns(0.25))],
    ids=str,
)
def test_after_any_pruner_the_mask_is_that_pruners(layer, pruner):
    weight, x, gram = layer
    grid = Grid(4, 8)
    before, after = pruner.prune(weight, gram), GPTQ(pruner, grid).prune(weight, gram)
    assert torch.equal(before.keep, after.keep)
    damping = getattr(pruner, "damping", 0.01)
    choose = lambda scores, start: before.keep[:, start : start + scores.shape[1]]  # noqa: E731
    solved, _, _ = oracles.gptq_obs(before.weight, x, damping, IN, choose, 8, 7, SHARES)
    seen = x.square().sum(0) > 0
    torch.testing.assert_close(after.weight[:, seen], solved[:, seen], rtol=1e-6, atol=1e-6)
    assert after.loss == pytest.approx(oracles.output_error(weight, after.weight, x))


def test_pruner_and_rounding_share_one_factorisation(layer, monkeypatch):
    calls = []
    real = stacked.damp

    def counting(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr("prune_callbacks.pruners.joint.damp", counting)
    weight, _, gram = layer
    GPTQ(SparseGPT(NM(2, 4), damping=0.03)).prune_together([weight, weight[:2]], gram)
    assert [arguments[1] for arguments in calls] == [0.03]


@pytest.mark.parametrize(
    "pruner", [SparseGPTQ(NM(2, 4), Grid(4, 8)), GPTQ(Wanda(Unstructured(0.5)), Grid(8, None))], ids=str
)
def test_layers_together_are_layers_alone(layer, pruner):
    weight, _, gram = layer
    others = [weight, weight[:3] * 2, torch.randn(4, IN, dtype=torch.float64)]
    for alone, together in zip(others, pruner.prune_together(others, gram), strict=True):
        single = pruner.prune(alone, gram)
        assert torch.equal(single.keep, together.keep)
        torch.testing.assert_close(single.weight, together.weight)
        assert torch.equal(single.scale, together.scale)


def test_together_loses_less_than_one_after_the_other(correlated):
    """Where there is something to make up for: many correlated features, few bits."""
    x = correlated(96, tokens=2000)
    gram = Gram(96)
    gram.update(x)
    weight, grid = torch.randn(32, 96, dtype=torch.float64), Grid(3, 32)
    pruned = SparseGPT(NM(2, 4)).prune(weight, gram)
    rounded, _ = round_to_nearest(pruned.weight, grid)
    after, joint = GPTQ(SparseGPT(NM(2, 4)), grid).prune(weight, gram), SparseGPTQ(NM(2, 4), grid).prune(weight, gram)
    to_nearest = oracles.output_error(weight, rounded, x)
    assert joint.loss < after.loss < to_nearest


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 3, 4, 7, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.floats(1e-6, 1e3),
    seed=st.integers(0, 99),
)
def test_codes_give_the_weights_back_bit_for_bit(bits, group, dtype, size, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, group)
    weight = torch.randn(3, 10, generator=generator) * size
    weight[0] = 0
    weight[1, ::2] = 0
    rounded, scale = round_to_nearest(weight, grid)
    rounded, scale = rounded.to(dtype), scale.half()
    codes = grid.encode(rounded, scale)
    assert codes.abs().max() <= grid.largest
    assert torch.equal(grid.decode(codes, scale, dtype), rounded)
    assert not codes[weight == 0].any()
    assert scale.shape == (3, grid.groups(10))


def test_the_nearest_point_is_at_most_half_a_step_away():
    weight, grid = torch.randn(50, 64), Grid(4, 16)
    rounded, scale = round_to_nearest(weight, grid)
    inside = weight.abs() <= grid.largest * grid.spread(scale, 64)
    assert ((rounded - weight).abs() <= 0.5001 * grid.spread(scale, 64))[inside].all()
    whole = weight.unflatten(1, (4, 16)).abs().amax(2) / 7
    assert (scale <= whole * 1.001).all()
    assert (scale < 0.99 * whole).any()  # the search clips where that is better
    unclipped = grid.rounded(weight, grid.spread(whole, 64))
    assert (rounded - weight).square().sum() < (unclipped - weight).square().sum()


def test_weights_that_were_trained_on_are_off_the_grid():
    grid = Grid(4, 8)
    rounded, scale = round_to_nearest(torch.randn(4, 16), grid)
    grid.encode(rounded, scale)
    rounded[1, 3] += 1e-4
    with pytest.raises(ValueError, match=r"1 of 64 weights are not whole multiples.*changed since. Quantize last"):
        grid.encode(rounded, scale)


def test_features_that_calibration_did_not_see_are_rounded_to_nearest(layer):
    weight, x, gram = layer
    dead = x.square().sum(0) == 0
    assert dead.any()
    grid = Grid(4, 8)
    pruned = GPTQ(grid=grid).prune(weight, gram)
    spread = grid.spread(pruned.scale.double(), IN)
    inside = (weight.abs() <= 7 * spread) & dead
    assert ((pruned.weight - weight).abs() <= 0.5001 * spread)[inside].all()
    assert pruned.weight[:, dead].any()
    assert not SparseGPTQ(NM(2, 4), grid).prune(weight, gram).weight[:, dead].any()  # as SparseGPT has it


def test_rounding_in_the_dtype_of_the_model(layer):
    weight, _, gram = layer
    pruner = SparseGPTQ(NM(2, 4), Grid(4, 8))
    pruned = pruner.prune(weight.bfloat16(), gram)
    assert pruned.weight.dtype == torch.bfloat16
    codes = pruner.grid.encode(pruned.weight, pruned.scale)
    assert torch.equal(pruner.grid.decode(codes, pruned.scale, torch.bfloat16), pruned.weight)


def test_the_engine_reports_scales_and_keeps_them_in_checkpoints():
    model, batches = tiny_llama(hidden_size=32, layers=2), list(torch.randint(3, 200, (4, 32)).split(2))
    pruner = SparseGPTQ(NM(2, 4), Grid(4, 16))
    report = prune_sequentially(model, batches, pruner, progress=False)
    report.masks.check(NM(2, 4))
    assert report.scales.keys() == report.masks.keys()
    for name, scale in report.scales.items():
        pruner.grid.encode(model.get_parameter(name).detach(), scale)
    again = PruneReport.from_state_dict(report.state_dict())
    assert all(torch.equal(again.scales[name], scale) for name, scale in report.scales.items())
    assert not prune_sequentially(model, batches, Wanda(NM(2, 4)), progress=False).scales


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(1), "bits of a code must be 2 to 8, got 1"),
        (lambda: Grid(9), "bits of a code must be 2 to 8, got 9"),
        (lambda: Grid(4, 0), "must be at least 1, got 0"),
        (lambda: SparseGPTQ(NM(2, 4), Grid(4, 6)), "group_size must be a multiple of the 4 columns"),
        (lambda: SparseGPTQ(Columns(0.5)), "SparseGPTQ chooses single weights"),
        (lambda: SparseGPTQ(NM(2, 4), 4), "takes a grid such as"),
        (lambda: GPTQ("wanda"), "GPTQ takes a pruner"),
        (lambda: GPTQ(SparseGPTQ(NM(2, 4))), "GPTQ takes a pruner that does not round"),
        (lambda: GPTQ(Structured(Columns(0.5))), "GPTQ rounds layers one by one"),
        (lambda: GPTQ(damping=-1.0), "must be >= 0"),
        (lambda: GPTQ().prune(torch.randn(2, 4), None), "GPTQ needs calibration statistics"),
    ],
)
def test_bad_input(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_weight_too_large_for_scales():
    with pytest.raises(ValueError, match=r"largest weight, 1e\+07, is too large for scales in float16"):
        round_to_nearest(torch.full((1, 4), 1e7), Grid(4))


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_calibration_never_saw_are_rounded_and_not_erased(bits):
    """A ReLU's channels that no calibration token opened, all of a group of the grid."""
    x = torch.randn(200, 64)
    x[:, 16:32] = 0
    gram = Gram(64)
    gram.update(x)
    weight = torch.randn(8, 64)
    weight[:, 20] *= 3
    grid = Grid(bits, 16)
    pruned = GPTQ(grid=grid).prune(weight, gram)
    assert bool(pruned.weight[:, 16:32].any(1).all())
    alone, _ = round_to_nearest(weight[:, 16:32], grid)
    assert torch.allclose(pruned.weight[:, 16:32], alone, atol=1e-6)
    assert torch.equal(pruned.weight, grid.decode(grid.encode(pruned.weight, pruned.scale), pruned.scale, weight.dtype))
