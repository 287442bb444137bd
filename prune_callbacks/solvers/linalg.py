"""Damped Grams and their factors."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.float64 import sum_in_float64
from prune_callbacks.solvers.precision import full_precision
from prune_callbacks.solvers.split import Split, split

CHOLESKY_ATTEMPTS = 4


class NumericalError(ValueError):
    """Raised if a factorisation or a solve fails; its text says what was tried. No weight has been changed then."""


@dataclass(frozen=True)
class DampedGram:
    """
    The damped Gram `H = G + damping * mean(diag G) * I` and the factor of its inverse.

    Attributes:
        matrix: `H`, (in, in). Rows and columns of dead features are those of the scaled identity.
        inverse_factor: `U`, (in, in), upper triangular with `H^-1 = U^T U`: the factor of SparseGPT's sweep.
        dead: marks the features that no token activated (`G_jj = 0`), (in,). Their weights have no effect and become 0.
        damping: the fraction that was used; larger than requested if the first factorisation failed.
        ridge: the number added to the diagonal, `damping * mean(diag G)`.
    """

    matrix: Float[Tensor, "in in"]
    inverse_factor: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    damping: float
    ridge: float

    @cached_property
    def inverse_diagonal(self) -> Float[Tensor, " in"]:
        """Returns `diag(H^-1)`."""
        return self.inverse_factor.square().sum(0)

    def inverse_blocks(self, size: int) -> Float[Tensor, "blocks size size"]:
        """Returns the diagonal blocks of `H^-1`, one for each group of `size` neighbouring features."""
        columns = self.inverse_factor.unflatten(1, (-1, size))
        return torch.einsum("iga,igb->gab", columns, columns)

    @cached_property
    def split(self) -> "Split":
        """Returns `H` as the sum of a diagonal, a low-rank part and a remainder; see `Split`."""
        # The rounding errors of inexact products must stay below the smallest eigenvalue, which the damping sets.
        return split(self.matrix, dtype=None if self.damping >= 0.005 else self.matrix.dtype)

    def excess_bound(
        self, residual: Float[Tensor, "out in"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, " out"]:
        """
        Computes `r H^-1 r^T` for every row r of residuals that are zero outside the row's kept set S.

        It is an upper bound on the excess of the row's loss over the optimum for the mask, `r H_SS^-1 r^T`, because
        `(H^-1)_SS - H_SS^-1` is positive semidefinite (Schur complement). The product is taken in `dtype` (None: the
        residual's). For the rounding errors of a coarser dtype 1 % is added.
        """
        dtype = residual.dtype if dtype is None else dtype
        factor, rounded = self.inverse_factor.to(dtype), residual.to(dtype)
        total, size = residual.new_zeros(len(residual)), len(self.matrix)
        for a in range(0, size, step := max(1, -(-size // 8))):
            # U is upper triangular: columns before a meet only zeros.
            image = (rounded[:, a:] @ factor[a : a + step, a:].T).to(residual.dtype)
            total += torch.linalg.vecdot(image, image)
        return total if dtype == residual.dtype else 1.01 * total


@full_precision()
def damp(gram: Float[Tensor, "in in"], damping: float) -> DampedGram:
    """
    Damps a Gram and factorises it.

    Equivalent to `torch.linalg.cholesky(torch.linalg.inv(H), upper=True)`. Computed by one Cholesky factorisation of
    `H` with its order reversed and one triangular inverse, so that no inverse is ever factorised.

    If the factorisation fails, it is repeated with ten times the damping, at most three times, and a warning reports
    the damping used.

    Args:
        gram: `G`, (in, in), float32 or float64.
        damping: the fraction of `mean(diag G)` to add to the diagonal.

    Raises:
        NumericalError: the Gram holds NaN or inf, or could not be factorised.
    """
    if not all_finite(gram):
        raise NumericalError(
            "the Gram of the calibration activations holds NaN or inf; the layer's inputs are not finite"
        )
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    unit = float(diagonal.clamp(min=0).mean()) or 1.0
    for attempt in range(CHOLESKY_ATTEMPTS):
        used = damping * 10**attempt
        matrix = gram.clone()
        matrix[dead, :] = 0
        matrix[:, dead] = 0
        matrix.diagonal().add_(used * unit).add_(dead.to(gram) * unit)
        # H = R R^T with R upper triangular is the Cholesky factorisation of H read backwards; U = R^-1.
        lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if int(info) == 0 and all_finite(lower):
            # Copies of a wide layer's Gram are large: each is freed or overwritten before the next is made.
            factor = lower.flip(0, 1)
            del lower
            # Transposed, it has the memory layout of the solution, which overwrites it.
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device).T
            inverse_factor = torch.linalg.solve_triangular(factor, identity, upper=True, out=identity)
            if attempt:
                warnings.warn(f"damping {damping} was too small for a factorisation; used {used}", stacklevel=2)
            return DampedGram(matrix, inverse_factor, dead, used, used * unit)
        if damping == 0:
            break
    raise NumericalError(
        f"the damped Gram of {len(gram)} features is not positive definite, tried damping {damping} to {used}. "
        "Use more calibration tokens or a larger damping (0.01 is the usual value)."
    )


@full_precision()
def ridge_inverse(matrix: Float[Tensor, "in in"], added: Float[Tensor, " in"]) -> Float[Tensor, "in in"]:
    """Computes `(H + diag(added))^-1` of a positive definite H, by a Cholesky factorisation."""
    regular = matrix.clone()
    regular.diagonal().add_(added)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular))


@full_precision()
def quadratic_form(rows: Float[Tensor, "rows in"], gram: Float[Tensor, "in in"]) -> float:
    """
    Computes `sum over rows of r G r^T`, the squared norm of the rows' products with the inputs.

    The rows' sums are added up in float64. (Products with one half of the symmetric G only, strip by strip, took longer
    on CPUs: 14 ms against 9 ms for 3072 x 576 on two cores.)
    """
    return float(sum_in_float64(torch.linalg.vecdot(rows @ gram, rows)))


def all_finite(x: Tensor) -> bool:
    """Returns whether no number is NaN or inf, in one pass and without a copy."""
    return x.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(x))
