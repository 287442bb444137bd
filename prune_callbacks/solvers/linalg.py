"""Damped Grams and their factors."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prune_callbacks.solvers.split import Split, split

CHOLESKY_ATTEMPTS = 4


class NumericalError(ValueError):
    """A factorisation or a solve failed; the text says what was tried. Nothing was changed."""


@dataclass(frozen=True)
class DampedGram:
    """
    `H = G + damping * mean(diag G) * I` and the factor of its inverse.

    Attributes:
        matrix: `H`, shape (in, in). Rows and columns of dead features are those of the identity, scaled.
        inverse_factor: `U`, upper triangular with `H^-1 = U^T U`: the factor that SparseGPT sweeps with.
        dead: features that no token activated (`G_jj = 0`): their weights do nothing and become 0.
        damping: the fraction that was used, larger than asked for if the first factorisation failed.
        ridge: what was added to the diagonal.
    """

    matrix: Float[Tensor, "in in"]
    inverse_factor: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    damping: float
    ridge: float

    @cached_property
    def inverse_diagonal(self) -> Float[Tensor, " in"]:
        """`diag(H^-1)`."""
        return self.inverse_factor.square().sum(0)

    def inverse_blocks(self, size: int) -> Float[Tensor, "blocks size size"]:
        """The squares of `H^-1` along its diagonal, for groups of `size` neighbouring features."""
        columns = self.inverse_factor.unflatten(1, (-1, size))
        return torch.einsum("iga,igb->gab", columns, columns)

    @cached_property
    def split(self) -> "Split":
        """`H` as a diagonal, a low-rank part and a remainder; see `prune_callbacks.solvers.split`."""
        # The rounding of inexact products must stay below the smallest eigenvalues, which the damping sets.
        return split(self.matrix, dtype=None if self.damping >= 0.005 else self.matrix.dtype)

    def excess_bound(
        self, residual: Float[Tensor, "out in"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, " out"]:
        """
        `r H^-1 r^T` of every row, for residuals that are zero outside the row's kept set S.

        It bounds from above how far a loss lies above the optimum for the mask, which is `r H_SS^-1 r^T`:
        `(H^-1)_SS - H_SS^-1` is positive semidefinite (Schur complement). The product is taken in `dtype` (None: the
        residual's); the rounding errors of a coarser one add to the sum, and 1 % is added for them.
        """
        dtype = residual.dtype if dtype is None else dtype
        factor, rounded = self.inverse_factor.to(dtype), residual.to(dtype)
        total, size = residual.new_zeros(len(residual)), len(self.matrix)
        for a in range(0, size, step := max(1, -(-size // 8))):
            # U is upper triangular: columns before a meet only zeros.
            image = (rounded[:, a:] @ factor[a : a + step, a:].T).to(residual.dtype)
            total += torch.linalg.vecdot(image, image)
        return total if dtype == residual.dtype else 1.01 * total


def damp(gram: Float[Tensor, "in in"], damping: float) -> DampedGram:
    """
    Damps a Gram and factorises it.

    Equivalent to `torch.linalg.cholesky(torch.linalg.inv(H), upper=True)`, by one Cholesky factorisation of
    `H` with its order reversed and one triangular inverse, so that no inverse is ever factorised.

    A failed factorisation is repeated with ten times the damping, with a warning, at most three times.

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
            # Every copy of a wide layer's Gram weighs: one is let go before the next is made, or written over.
            factor = lower.flip(0, 1)
            del lower
            # Transposed, it has the layout of the solution.
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


def ridge_inverse(matrix: Float[Tensor, "in in"], added: Float[Tensor, " in"]) -> Float[Tensor, "in in"]:
    """`(H + diag(added))^-1` of a positive definite H, by a Cholesky factorisation."""
    regular = matrix.clone()
    regular.diagonal().add_(added)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular))


def quadratic_form(rows: Float[Tensor, "rows in"], gram: Float[Tensor, "in in"]) -> float:
    """
    Computes `sum over rows of r G r^T`, the squared norm of what rows of weights make of the inputs.

    G is symmetric: products with what lies left of its diagonal are not made. Sums are added up in float64.
    """
    total, size = torch.zeros((), dtype=torch.float64, device=rows.device), len(gram)
    for a in range(0, size, step := max(64, -(-size // 8))):
        strip = rows[:, a : a + step]
        image = strip @ gram[a : a + step, a:]
        total += 2 * torch.linalg.vecdot(image, rows[:, a:]).sum(dtype=torch.float64)
        total -= torch.linalg.vecdot(image[:, : strip.shape[1]], strip).sum(dtype=torch.float64)
    return float(total)


def all_finite(x: Tensor) -> bool:
    """Whether no number is NaN or inf, in one pass and without a copy."""
    return x.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(x))
