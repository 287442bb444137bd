import itertools
import warnings

import oracles
import pytest
import torch

from prune_callbacks import ALPS, MRP, NM, Gram, InputNorm, SparseGPT, Unstructured
from prune_callbacks.solvers.least_squares import MaskedLeastSquares
from prune_callbacks.solvers.linalg import NumericalError, damp, ridge_inverse
from prune_callbacks.solvers.mrp import mask_m, mrp_sm
from prune_callbacks.solvers.split import split


def test_statistics_are_sums_over_tokens_whatever_the_batches(correlated):
    x = correlated(12).float()
    for make in (Gram, InputNorm):
        whole, first, second = make(12), make(12), make(12)
        whole.update(x)
        first.update(x[:100].view(4, 25, 12))
        second.update(x[100:])
        first.merge(second)
        assert first.tokens == whole.tokens == len(x)
        torch.testing.assert_close(first.squared_norm, whole.squared_norm)
        torch.testing.assert_close(whole.squared_norm, x.square().sum(0))
    gram = Gram(12)
    gram.update(x.bfloat16())
    assert gram.matrix.dtype == torch.float32
    with pytest.raises(ValueError, match=r"expected inputs of shape \(..., 12\), got \(5, 3\)"):
        gram.update(torch.rand(5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 600, 2100])
def test_a_gram_computed_by_strips_is_whole(size, dtype, monkeypatch):
    monkeypatch.setattr("prune_callbacks.solvers.statistics.AT_ONCE", 300 * size)
    gram, x = Gram(size), torch.randn(1000, size, dtype=dtype)
    for part in x.split([700, 17, 283]):  # of which the first is taken in three
        gram.update(part)
    exact = (x.double().T @ x.double()).to(dtype)
    torch.testing.assert_close(gram.matrix, exact, rtol=1e-5, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_statistics_of_a_few_rows_at_a_time_are_the_same(monkeypatch):
    x = torch.randn(3, 7, 16).bfloat16()
    whole = [Gram(16), InputNorm(16)]
    for statistic in whole:
        statistic.update(x)
    monkeypatch.setattr("prune_callbacks.solvers.statistics.AT_ONCE", 5 * 16)
    for statistic, before in zip([Gram(16), InputNorm(16)], whole, strict=True):
        statistic.update(x)
        assert statistic.tokens == before.tokens == 21
        torch.testing.assert_close(statistic.squared_norm, before.squared_norm)
        torch.testing.assert_close(before.squared_norm, x.float().square().sum((0, 1)))


@pytest.mark.parametrize("heights", [[30], [7, 14, 2, 7]], ids=str)
@pytest.mark.parametrize("block_size", [None, 32])
def test_rows_solved_some_at_a_time_end_where_all_do(correlated, monkeypatch, heights, block_size):
    x = correlated(96, tokens=400)
    system, weight = damp(x.T @ x, 0.01), torch.randn(30, 96, dtype=torch.float64)
    pattern = Unstructured(0.6)

    def choose(scores, start):
        return pattern.keep(scores)  # over all rows, in parts or not

    whole, keep, *_ = mrp_sm(weight, system, choose, block_size, heights)
    monkeypatch.setattr("prune_callbacks.solvers.mrp.AT_ONCE", 8 * 96)
    seen = []
    monkeypatch.setattr(
        "prune_callbacks.solvers.mrp.MaskedLeastSquares", lambda *a: seen.append(a[2]) or MaskedLeastSquares(*a)
    )
    parts, kept, *_ = mrp_sm(weight, system, choose, block_size, heights)
    assert seen == ([[8], [8], [8], [6]] if len(heights) == 1 else [[7], [8], [6, 2], [7]])
    assert torch.equal(kept, keep)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_damped_gram_and_its_inverse_factor(correlated):
    x = correlated(20)
    system = damp(x.T @ x, 0.01)
    alive = ~system.dead
    expected = oracles.damped(x, 0.01)
    assert system.dead.nonzero()[:, 0].tolist() == [3, 18]
    torch.testing.assert_close(system.matrix[alive][:, alive], expected[alive][:, alive])
    inverse = torch.linalg.inv(system.matrix)
    torch.testing.assert_close(system.inverse_factor, torch.linalg.cholesky(inverse, upper=True))
    torch.testing.assert_close(system.inverse_blocks(4)[2], inverse[8:12, 8:12])
    assert torch.equal(ridge_inverse(torch.eye(3), torch.full((3,), 3.0)), torch.eye(3) / 4)
    torch.testing.assert_close(system.inverse_diagonal, inverse.diagonal())


def test_failed_factorisations_are_graded():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0])) + 1.02 * (torch.ones(3, 3) - torch.eye(3))
    with pytest.warns(UserWarning, match=r"damping 0.01 was too small for a factorisation; used 0.1"):
        assert damp(indefinite, 0.01).damping == 0.1
    with pytest.raises(NumericalError, match=r"3 features is not positive definite, tried damping 1e-05 to 0.01"):
        damp(indefinite, 1e-5)
    with pytest.raises(NumericalError, match="tried damping 0.0 to 0.0"):
        damp(indefinite, 0.0)
    with pytest.raises(NumericalError, match="NaN or inf"):
        damp(torch.full((2, 2), torch.inf), 0.01)


def converge(dense, system, keep, tolerance):
    solution = MaskedLeastSquares(dense, system)
    solution.restrict(keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution.solve(tolerance)
    return solution


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("tokens", [300, 10])
def test_masked_least_squares_reaches_the_optimum(correlated, dtype, tolerance, tokens):
    x = correlated(40, tokens)
    dense = torch.randn(9, 40, dtype=torch.float64)
    dense[:, x.square().sum(0) == 0] = 0
    keep = torch.rand(9, 40) > 0.5
    keep[0], keep[1] = True, False
    system = damp((x.T @ x).to(dtype), 0.01)
    solution = converge(dense.to(dtype), system, keep, tolerance)
    solved = solution.weight.double()
    expected = oracles.least_squares(dense, x, 0.01, keep)
    matrix = damp(x.T @ x, 0.01).matrix

    def loss(weight):
        return float((((weight - dense) @ matrix) * (weight - dense)).sum())

    assert loss(expected) <= loss(solved) * (1 + 1e-12) <= loss(expected) * (1 + 2 * tolerance) + 1e-9
    assert (solved[~keep] == 0).all()
    assert float(solution.loss) == pytest.approx(loss(solved), rel=1e-4)


def test_stacked_layers_converge_each_by_itself(correlated):
    """The small layer's excess is not hidden behind the loss of the large one."""
    x = correlated(200, tokens=1000)
    system = damp(x.T @ x, 0.01)
    dense = torch.randn(14, 200, dtype=torch.float64) * torch.tensor([1e4] * 6 + [1.0] * 8)[:, None]
    dense[:, system.dead] = 0
    keep = torch.rand(14, 200) > 0.5
    solution = MaskedLeastSquares(dense, system, heights=[6, 8])
    solution.restrict(keep)
    solution.solve(1e-3)
    expected = oracles.least_squares(dense, x, 0.01, keep)
    for rows, loss in zip((slice(0, 6), slice(6, 14)), solution.loss, strict=True):
        change, least = solution.weight[rows] - dense[rows], expected[rows] - dense[rows]
        optimum = float(((least @ system.matrix) * least).sum())
        assert float(((change @ system.matrix) * change).sum()) == pytest.approx(float(loss))
        assert optimum * (1 - 1e-12) <= float(loss) <= optimum * (1 + 1e-3)


def test_the_bound_on_the_excess_holds_in_every_row(correlated):
    for dtype in (torch.float64, torch.float32):
        x = correlated(60, tokens=500)
        system = damp((x.T @ x).to(dtype), 0.01)
        dense = torch.randn(20, 60, dtype=dtype).masked_fill(system.dead, 0)
        keep = torch.rand(20, 60) > 0.5
        solution = MaskedLeastSquares(dense, system)
        solution.restrict(keep)
        solution.certify()
        bound = system.excess_bound(solution.gradient * solution.kept).double()
        best = oracles.least_squares(dense, x, 0.01, keep) - dense
        change, matrix = (solution.weight - dense).double(), system.matrix.double()
        excess = ((change @ matrix) * change).sum(1) - ((best @ matrix) * best).sum(1)
        assert (excess <= bound * (1 + 1e-3)).all()
        assert (bound <= 20 * excess).all()  # and says something


def test_the_split_restores_the_matrix_and_inverts_under_every_mask(correlated):
    x = correlated(40)
    matrix = damp(x.T @ x, 0.01).matrix
    parts = split(matrix, rank=8)
    model = torch.diag(parts.diagonal) + parts.basis @ parts.basis.T
    torch.testing.assert_close(model + parts.remainder, matrix)
    torch.testing.assert_close(model.diagonal(), matrix.diagonal(), rtol=1e-3, atol=0)
    rows = torch.randn(5, 40, dtype=torch.float64)
    torch.testing.assert_close(parts.product(rows), rows @ matrix)
    keep = torch.rand(5, 40) > 0.5
    keep[0] = False
    solved = parts.restricted(keep.double())(rows * keep)
    for row, kept, result in zip(rows, keep, solved, strict=True):
        expected = torch.zeros(40, dtype=torch.float64)
        expected[kept] = torch.linalg.solve(model[kept][:, kept], row[kept])
        torch.testing.assert_close(result, expected)


def test_masked_least_squares_ends_where_survivors_replace_everything():
    """Every feature stands twice, so half of them can go at a loss far below float32's resolution of the start's."""
    x = torch.randn(300, 20).repeat_interleave(2, 1)
    dense, keep = torch.randn(5, 40), torch.tensor([True, False]).repeat(5, 20)
    solved = converge(dense, damp(x.T @ x, 1e-6), keep, torch.finfo(torch.float32).eps).weight
    torch.testing.assert_close(solved[:, ::2], dense[:, ::2] + dense[:, 1::2], rtol=1e-3, atol=1e-3)


def test_masked_least_squares_says_when_it_did_not_converge(correlated):
    x = correlated(200, dead=0)
    dense = torch.randn(3, 200, dtype=torch.float64)
    keep = torch.rand(3, 200) > 0.5
    solution = MaskedLeastSquares(dense, damp(x.T @ x, 0.01))
    solution.restrict(keep)
    solution.descend = lambda tolerance: False
    with pytest.warns(UserWarning, match="did not converge; its loss may lie up to .* above the optimum"):
        solution.solve(1e-6)
    masked = dense * keep - dense
    assert float(solution.loss) <= float(((masked @ solution.system.matrix) * masked).sum())


@pytest.mark.parametrize("m", [4, 8])
def test_mask_m_tries_every_subset(correlated, m):
    weight = torch.randn(7, 24, dtype=torch.float64)
    weight[2, :m] = 0  # a group that is already zero
    weight[3] = torch.randint(-1, 2, (24,))
    x = correlated(24, dead=0)
    inverse = torch.linalg.inv(oracles.damped(x, 0.01))
    system = damp(x.T @ x, 0.01)
    for n in (1, m // 2, m - 1):
        keep = mask_m(weight, system.inverse_blocks(m), n)
        assert (keep.unflatten(1, (-1, m)).sum(-1) == n).all()
        for r, g in itertools.product(range(7), range(24 // m)):
            block = slice(g * m, g * m + m)
            losses = {
                kept: oracles.removal_loss(weight[r, block], inverse[block, block], kept)
                for kept in itertools.combinations(range(m), n)
            }
            chosen = tuple(keep[r, block].nonzero()[:, 0].tolist())
            assert losses[chosen] <= min(losses.values()) * (1 + 1e-9) + 1e-12


def test_mask_m_in_chunks_of_rows_is_the_same(correlated, monkeypatch):
    x, weight = correlated(24), torch.randn(50, 24, dtype=torch.float64)
    blocks = damp(x.T @ x, 0.01).inverse_blocks(4)
    whole = mask_m(weight, blocks, 2)
    monkeypatch.setattr("prune_callbacks.solvers.mrp.CHUNK", 24 * 7)
    assert torch.equal(mask_m(weight, blocks, 2), whole)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(1, 4)], ids=str)
def test_sparsegpt_equals_the_loop_over_columns(correlated, pattern):
    x, weight = correlated(96, dead=0), torch.randn(11, 96, dtype=torch.float64)
    gram = Gram(96)
    gram.update(x)
    pruned = SparseGPT(pattern, block_size=32).prune(weight, gram)
    solved, keep = oracles.sparsegpt_columns(weight, damp(x.T @ x, 0.01).inverse_factor, pattern, 32)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight, solved)


@pytest.fixture
def inexact(monkeypatch):
    """Products in bfloat16, whether this machine has them in hardware or not."""
    monkeypatch.setattr("prune_callbacks.solvers.split.product_dtype", lambda like: torch.bfloat16)
    monkeypatch.setattr("prune_callbacks.solvers.alps.product_dtype", lambda like: torch.bfloat16)


def ill_conditioned(tokens, size=256):
    x = torch.randn(tokens, size) @ (torch.randn(size, size) * torch.arange(1, size + 1)[:, None] ** -0.7)
    gram = Gram(size)
    gram.update(x)
    return gram, damp(gram.matrix.double(), 0.01)


@pytest.mark.parametrize("tokens", [64, 1000])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_inexact_products_lead_to_the_same_optimum(inexact, tokens, pattern):
    gram, system = ill_conditioned(tokens)
    weight = torch.randn(32, 256)
    assert damp(gram.matrix, 0.01).split.remainder.dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = MRP(pattern, block_size=None).prune(weight, gram)
    exact = MaskedLeastSquares(weight.double(), system)
    exact.restrict(pruned.keep)
    exact.solve(1e-12)
    change = pruned.weight.double() - weight.double()
    loss = float(((change @ system.matrix) * change).sum())
    assert float(exact.loss) <= loss <= float(exact.loss) * 1.001


@pytest.mark.parametrize("damping", [1e-2, 1e-3, 1e-4])
def test_low_damping_and_few_tokens_end_well_in_every_method(inexact, damping):
    """Where bfloat16 would leave the matrix indefinite; conjugate gradients on that diverge to NaN."""
    for tokens in (64, 256, 1000):
        gram, _ = ill_conditioned(tokens)
        weight = torch.randn(16, 256)
        for pruner in (MRP(Unstructured(0.5), damping=damping), ALPS(Unstructured(0.5), damping=damping)):
            pruned = pruner.prune(weight, gram)
            exact = Gram(256)
            exact.matrix, exact.tokens = gram.matrix.double(), gram.tokens
            reference = pruner.prune(weight.double(), exact)
            assert pruned.weight.isfinite().all()
            # Judged by what is minimised, the damped loss: of 64 tokens the undamped one is 1e-8 of the output.
            damped = exact.matrix + damping * exact.matrix.diagonal().mean() * torch.eye(256, dtype=torch.float64)
            found, least = (
                float(((change @ damped) * change).sum())
                for change in (result.weight.double() - weight.double() for result in (pruned, reference))
            )
            assert found <= least * 1.05


def test_the_solver_leaves_inexact_products_where_they_make_the_matrix_indefinite(inexact):
    """The positive control: forced to stay with them it would not converge."""
    gram, _ = ill_conditioned(64)
    system = damp(gram.matrix, 1e-4)
    system.__dict__["split"] = split(system.matrix, dtype=torch.bfloat16)
    solution = MaskedLeastSquares(torch.randn(16, 256), system)
    solution.restrict(torch.rand(16, 256) > 0.5)
    assert not solution.descend(1e-4)
    solution.solve()
    assert solution.split.remainder.dtype == torch.float32
    assert solution.weight.isfinite().all()
    removed = solution.dense * (1 - solution.kept)
    assert float(solution.loss) < float(((removed @ system.matrix) * removed).sum())


def test_weights_beyond_the_range_of_their_dtype_are_refused():
    gram = Gram(8)
    gram.update(torch.randn(100, 4).repeat_interleave(2, 1))
    weight = torch.full((2, 8), 6e4).half()
    with pytest.raises(NumericalError, match=r"the pruned weights hold NaN or inf in torch.float16"):
        MRP(Unstructured(0.5), damping=1e-4).prune(weight, gram)
