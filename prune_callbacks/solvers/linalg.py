"""Damped Grams, their factors, and least squares under a fixed mask."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
    """

    matrix: Float[Tensor, "in in"]
    inverse_factor: Float[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    damping: float

    @cached_property
    def inverse(self) -> Float[Tensor, "in in"]:
        """`H^-1`, computed on first use."""
        return self.inverse_factor.T @ self.inverse_factor

    @property
    def inverse_diagonal(self) -> Float[Tensor, " in"]:
        """`diag(H^-1)`."""
        return self.inverse_factor.square().sum(0)


def damp(gram: Float[Tensor, "in in"], damping: float) -> DampedGram:
    """
    Damps a Gram and factorises it.

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
    max_iterations: int = 500,
) -> Float[Tensor, "out in"]:
    """
    The weights of least `(w - dense) H (w - dense)^T` in every row that are zero outside `keep`.

    Equivalent to `w_S = H_SS^-1 (H dense)_S` row by row (Zhao et al. 2024, eq. 13, written as ridge least
    squares on the kept set S). Computed by conjugate gradients on all rows at once, so that the cost is
    matrix products and no row needs a factorisation of its own.

    The preconditioner is `(H^-1)_SS`, which costs one more product per step and pays twice. On Grams of SmolLM2's
    layers it takes 11 to 15 steps to a relative excess of 1e-6 where a Jacobi preconditioner takes 30 to 50, and
    30 on the worst of them, where Jacobi's stands at 1e-4 after 60. And it certifies the result: with residual r on
    S the excess loss is `r H_SS^-1 r^T`, which is at most `r (H^-1)_SS r^T`, because `(H^-1)_SS - H_SS^-1` is
    positive semidefinite (Schur complement); that bound is the quantity the iteration computes anyway.

    Args:
        dense: the weights to stay close to.
        system: the damped Gram.
        keep: where weights may be non-zero.
        start: where to begin, any weights; those outside `keep` are ignored.
        tolerance: stop when the certified excess of the summed loss is at most this fraction of it.
        max_iterations: warns if this many do not suffice.
    """
    matrix, inverse, kept = system.matrix, system.inverse, keep.to(dense.dtype)
    weight = start * kept
    image = (dense - weight) @ matrix
    loss = float(((dense - weight) * image).sum(dtype=torch.float64))
    # The loss left over may be far below the one begun with; it is not known more exactly than this.
    resolution = torch.finfo(dense.dtype).eps * loss
    residual = image.mul_(kept)
    scaled = (residual @ inverse).mul_(kept)
    energy = (residual * scaled).sum(1, keepdim=True)
    direction = scaled
    for _ in range(max_iterations):
        excess = float(energy.sum(dtype=torch.float64))
        if excess <= tolerance * max(loss, resolution):
            return weight
        image = (direction @ matrix).mul_(kept)
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0)  # a finished row rests
        weight = weight.addcmul_(length, direction)
        residual = residual.addcmul_(length, image, value=-1)
        loss -= float((length * energy).sum(dtype=torch.float64))
        scaled = (residual @ inverse).mul_(kept)
        energy, previous = (residual * scaled).sum(1, keepdim=True), energy
        direction = torch.where(previous > 0, energy / previous, 0).mul(direction).add_(scaled)
    warnings.warn(
        f"least squares under the mask stopped after {max_iterations} iterations; its loss may lie up to "
        f"{excess / max(loss, 1e-300):.1e} above the optimum, relatively (asked: {tolerance:.0e})",
        stacklevel=2,
    )
    return weight
