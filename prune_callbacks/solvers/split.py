"""Splits a Gram into diagonal + low rank + remainder, which makes least squares under many masks at once cheap."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

POWER_STEPS = 2


@dataclass(frozen=True)
class Split:
    """
    `H = diag(diagonal) + basis basis^T + remainder`, with a remainder whose diagonal is zero or nearly so.

    The basis holds the few large eigenvalues that outlier and correlated features cause; without them a Gram is close
    to its diagonal. So the first two parts, M, precondition systems with H, and their inverse under any mask is exact
    (`restricted`). A product with the remainder may be taken in bfloat16, in a quarter of the time of float32 where
    the hardware supports it, because its terms do not cancel as those of a product with H do.
    """

    diagonal: Float[Tensor, " in"]
    basis: Float[Tensor, "in rank"]
    remainder: Float[Tensor, "in in"]

    def product(self, x: Float[Tensor, "out in"], out: Tensor | None = None) -> Float[Tensor, "out in"]:
        """Computes `x H`, to the precision of the remainder's dtype; writes it to `out` if given."""
        image = torch.mul(x, self.diagonal, out=out).addmm_(x @ self.basis, self.basis.T)
        return image.add_(x.to(self.remainder.dtype) @ self.remainder)

    def restricted(self, kept: Float[Tensor, "out in"]) -> "RestrictedInverse":
        """Returns the inverses of `M_SS` for all rows; `kept` is 1 on the row's set S and 0 elsewhere."""
        scaled = self.basis / self.diagonal[:, None]
        rank = self.basis.shape[1]
        row, column = torch.triu_indices(rank, rank, device=kept.device)
        # Woodbury's small matrix of every row, I + sum over S of b_j b_j^T / d_j: one product for all rows.
        sums = kept @ (scaled[:, row] * self.basis[:, column])
        small = sums.new_empty(len(kept), rank, rank)
        small[:, column, row] = sums  # the lower triangle: the factorisation reads no more
        small.diagonal(dim1=-2, dim2=-1).add_(1)
        factor, info = torch.linalg.cholesky_ex(small)
        assert not bool(info.any()), "I + B^T D^-1 B is positive definite"
        return RestrictedInverse(self, scaled, kept, factor)


@dataclass(frozen=True)
class RestrictedInverse:
    """The operators `M_SS^-1` of every row's kept set S; a call applies them to all rows at once."""

    of: Split
    scaled: Float[Tensor, "in rank"]
    kept: Float[Tensor, "out in"]
    factor: Float[Tensor, "out rank rank"]

    def __call__(self, residual: Float[Tensor, "out in"], out: Tensor | None = None) -> Float[Tensor, "out in"]:
        """
        Computes `M_SS^-1 r` for every row r, and writes it to `out` if given.

        Each r must be zero outside its S, and so is the result. Equivalent to `torch.linalg.solve(M[S][:, S], r[S])`
        row by row; computed by Woodbury's identity.
        """
        inner = torch.cholesky_solve((residual @ self.scaled)[..., None], self.factor)[..., 0]
        solved = torch.addmm(residual, inner, self.of.basis.T, alpha=-1, out=out)
        return solved.div_(self.of.diagonal).mul_(self.kept)


def split(matrix: Float[Tensor, "in in"], rank: int | None = None, dtype: torch.dtype | None = None) -> Split:
    """
    Splits a positive definite matrix into diagonal, low-rank part and remainder.

    The basis is the Nystroem approximation of the matrix scaled to a unit diagonal, on a subspace found by a few
    power steps from a fixed seed, so that the same matrix always gives the same result. (Frangella, Tropp and Udell
    2023 precondition with it and a constant diagonal; the diagonal here restores that of the matrix.)

    Args:
        matrix: (in, in), float32 or float64.
        rank: columns of the basis; None: between 16 and 64, growing with `in`.
        dtype: dtype of the remainder; None: `product_dtype(matrix)`.
    """
    n = len(matrix)
    # The cost of the rank grows with its square, its benefit with n.
    rank = max(16, min(64, n // 96)) if rank is None else rank
    unit = matrix.diagonal().sqrt()
    scaled = matrix / (unit[:, None] * unit)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(n, min(rank, n), generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(POWER_STEPS):
        sketch, _ = torch.linalg.qr(scaled @ sketch)
    image = scaled @ sketch
    values, vectors = torch.linalg.eigh(sketch.T @ image)
    usable = values > values[-1] * torch.finfo(matrix.dtype).eps * n  # rounding may make some negative
    basis = (image @ vectors[:, usable]) * values[usable].rsqrt()
    # Clamped so that a feature that the basis explains completely does not get a huge inverse.
    rest = (1 - basis.square().sum(1)).clamp(min=1e-4)
    diagonal, basis = rest * unit.square(), basis * unit[:, None]
    remainder = torch.addmm(matrix, basis, basis.T, alpha=-1)
    remainder.diagonal().sub_(diagonal)
    return Split(diagonal, basis, remainder.to(product_dtype(matrix) if dtype is None else dtype))


def product_dtype(like: Tensor) -> torch.dtype:
    """Returns the dtype for inexact products: bfloat16 where it is faster than float32, else that of `like`."""
    if like.dtype != torch.float32:
        return like.dtype
    if like.is_cuda:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else like.dtype
