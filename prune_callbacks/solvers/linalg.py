"""Damped Grams, their factors, and least squares under a fixed mask."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHOLESKY_ATTEMPTS = 4


class NumericalError(ValueError):
    """A factorisation or a solve failed; the text says what was tried. Nothing was changed."""


@dataclass(frozen=True)
class DampedGram:
    """`H = G + damping * mean(diag G) * I` and the factor of its inverse.

    Attributes:
        matrix: `H`, shape (in, in). Rows and columns of dead features are those of the identity, scaled.
        inverse_factor: `U`, upper triangular with `H^-1 = U^T U`: the factor that SparseGPT sweeps with.
        dead: features that no token activated (`G_jj = 0`): their weights do nothing and become 0.
        damping: the fraction that was used, larger than asked for if the first factorisation failed.
    """

    matrix: Float[Tensor, "in in"]
    inverse_factor: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    damping: float

    @property
    def inverse_diagonal(self) -> Float[Tensor, " in"]:
        """`diag(H^-1)`."""
        return self.inverse_factor.square().sum(0)


def damp(gram: Float[Tensor, "in in"], damping: float) -> DampedGram:
    """Damps a Gram and factorises it.

    Equivalent to `torch.linalg.cholesky(torch.linalg.inv(H), upper=True)`, by one Cholesky factorisation of
    `H` with its order reversed and one triangular inverse, so that no inverse is ever factorised.

    A failed factorisation is repeated with ten times the damping, with a warning, at most three times.

    Raises:
        NumericalError: the Gram holds NaN or inf, or could not be factorised.
    """
    if not bool(torch.isfinite(gram).all()):
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
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            inverse_factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if attempt:
                warnings.warn(f"damping {damping} was too small for a factorisation; used {used}", stacklevel=2)
            return DampedGram(matrix, inverse_factor, dead, used)
        if damping == 0:
            break
    raise NumericalError(
        f"the damped Gram of {len(gram)} features is not positive definite, tried damping {damping} to {used}. "
        "Use more calibration tokens or a larger damping (0.01 is the usual value)."
    )


def masked_least_squares(
    dense: Float[Tensor, "out in"],
    system: DampedGram,
    keep: Bool[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    tolerance: float,
    max_iterations: int = 1000,
) -> Float[Tensor, "out in"]:
    """The weights of least `(w - dense) H (w - dense)^T` in every row that are zero outside `keep`.

    Equivalent to `w_S = H_SS^-1 (H dense)_S` row by row (Zhao et al. 2024, eq. 13, as ridge least squares on
    the kept set S), computed by conjugate gradients with a Jacobi preconditioner on all rows at once, so that
    the only cost is matrix products and no row needs a factorisation.

    Stops on a certified bound: with residual r on S, the excess loss is `r H_SS^-1 r^T`, at most
    `r H^-1 r^T = ||U r||^2` (the Schur complement only enlarges the inverse's block).

    Args:
        dense: the weights to stay close to.
        system: the damped Gram.
        keep: where weights may be non-zero.
        start: where to begin, any weights; those outside `keep` are ignored.
        tolerance: allowed excess of the summed loss over the optimum, relative to that loss.
        max_iterations: warns if this many do not suffice. The best weights seen are returned.
    """
    matrix, kept = system.matrix, keep.to(dense.dtype)
    inverse_diagonal = matrix.diagonal().reciprocal()
    weight = start * kept
    best, best_loss, checks_without_gain = weight, float("inf"), 0
    done = 0
    while True:
        # The true residual, not the recurrence's: rounding would otherwise fool the bound.
        difference = (dense - weight) @ matrix
        loss = float(((dense - weight) * difference).sum(dtype=torch.float64))
        residual = difference * kept
        checks_without_gain = 0 if loss < best_loss * (1 - tolerance / 10) else checks_without_gain + 1
        if loss < best_loss:
            best, best_loss = weight, loss
        excess = float((residual @ system.inverse_factor.T).square().sum(dtype=torch.float64))
        # Two checks without gain: the dtype's own rounding has been reached.
        if excess <= tolerance * best_loss or checks_without_gain == 2:
            return best
        if done >= max_iterations:
            warnings.warn(
                f"least squares under the mask stopped after {done} iterations with a relative excess loss of at "
                f"most {excess / best_loss:.1e} (asked: {tolerance:.0e})",
                stacklevel=2,
            )
            return best
        steps = 10
        weight = _conjugate_gradients(weight, residual, matrix, kept, inverse_diagonal, steps)
        done += steps


def _conjugate_gradients(
    weight: Tensor, residual: Tensor, matrix: Tensor, kept: Tensor, inverse_diagonal: Tensor, steps: int
) -> Tensor:
    scaled = residual * inverse_diagonal
    direction = scaled
    energy = (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ matrix).mul_(kept)
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0)  # a row without anything left to do rests
        weight = weight + length * direction
        residual = residual - length * image
        scaled = residual * inverse_diagonal
        energy, previous = (residual * scaled).sum(1, keepdim=True), energy
        direction = scaled + torch.where(previous > 0, energy / previous, 0) * direction
    return weight
