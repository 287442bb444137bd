import warnings

import oracles
import pytest
import torch

from prune_callbacks import Gram, InputNorm
from prune_callbacks.solvers.linalg import NumericalError, damp, masked_least_squares


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


def test_damped_gram_and_its_inverse_factor(correlated):
    x = correlated(20)
    system = damp(x.T @ x, 0.01)
    alive = ~system.dead
    expected = oracles.damped(x, 0.01)
    assert system.dead.nonzero()[:, 0].tolist() == [3, 18]
    torch.testing.assert_close(system.matrix[alive][:, alive], expected[alive][:, alive])
    inverse = torch.linalg.inv(system.matrix)
    torch.testing.assert_close(system.inverse_factor, torch.linalg.cholesky(inverse, upper=True))
    torch.testing.assert_close(system.inverse, inverse)
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("tokens", [300, 10])
def test_masked_least_squares_reaches_the_optimum(correlated, dtype, tolerance, tokens):
    x = correlated(40, tokens)
    dense = torch.randn(9, 40, dtype=torch.float64)
    dense[:, x.square().sum(0) == 0] = 0
    keep = torch.rand(9, 40) > 0.5
    keep[0], keep[1] = True, False
    system = damp((x.T @ x).to(dtype), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved = masked_least_squares(dense.to(dtype), system, keep, dense.to(dtype), tolerance).double()
    expected = oracles.least_squares(dense, x, 0.01, keep)
    matrix = damp(x.T @ x, 0.01).matrix

    def loss(weight):
        return float((((weight - dense) @ matrix) * (weight - dense)).sum())

    assert loss(expected) <= loss(solved) * (1 + 1e-12) <= loss(expected) * (1 + 2 * tolerance) + 1e-9
    assert (solved[~keep] == 0).all()


def test_masked_least_squares_ends_where_survivors_replace_everything():
    """Every feature stands twice, so half of them can go at a loss far below float32's resolution of the start's."""
    x = torch.randn(300, 20).repeat_interleave(2, 1)
    dense, keep = torch.randn(5, 40), torch.tensor([True, False]).repeat(5, 20)
    system = damp(x.T @ x, 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved = masked_least_squares(dense, system, keep, dense, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(solved[:, ::2], dense[:, ::2] + dense[:, 1::2], rtol=1e-3, atol=1e-3)


def test_masked_least_squares_says_when_it_did_not_converge(correlated):
    x = correlated(40, dead=0)
    dense = torch.randn(3, 40, dtype=torch.float64)
    keep = torch.rand(3, 40) > 0.5
    with pytest.warns(UserWarning, match="stopped after 2 iterations; its loss may lie up to"):
        masked_least_squares(dense, damp(x.T @ x, 0.01), keep, dense, 1e-12, max_iterations=2)
