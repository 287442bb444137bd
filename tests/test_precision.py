"""Solvers compute in full float32 whatever precision the user has chosen for matrix products."""

import pytest
import torch

from prune_callbacks import ALPS, GPTQ, MRP, NM, Gram, SparseGPT, Unstructured
from prune_callbacks.solvers.precision import full_precision


@pytest.fixture
def medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def factors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 96, generator=generator), torch.randn(96, 64, generator=generator)


@pytest.mark.parametrize(
    "pruner",
    [
        SparseGPT(NM(2, 4)),
        MRP(Unstructured(0.5)),
        MRP(NM(2, 4), "MM"),
        ALPS(Unstructured(0.6)),
        GPTQ(SparseGPT(NM(2, 4))),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
def test_solvers_give_what_they_give_in_full_precision(pruner, correlated):
    gram = Gram(64)
    gram.update(correlated(64, tokens=400).float())
    weight = factors()[0][:, :64]
    expected = pruner.prune(weight, gram)
    torch.set_float32_matmul_precision("medium")
    try:
        found = pruner.prune(weight, gram)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.keep, expected.keep)


def test_the_users_precision_is_there_again_also_after_an_error(medium):
    a, b = factors()
    exact = a.double() @ b.double()
    rounded = float((a @ b - exact).abs().max())
    with full_precision():
        assert float((a @ b - exact).abs().max()) < 1e-4
    assert float((a @ b - exact).abs().max()) == rounded
    with pytest.raises(ValueError, match="no"), full_precision():
        raise ValueError("no")
    assert torch.get_float32_matmul_precision() == "medium"
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert rounded > 1e-2  # a control: this CPU does round
