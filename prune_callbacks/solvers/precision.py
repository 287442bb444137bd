"""Full precision in solvers, whatever precision the user has chosen for products of float32 matrices."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """
    Temporarily computes products of float32 matrices in float32; a decorator too.

    `torch.set_float32_matmul_precision("high")`, which Lightning recommends on GPUs, rounds their factors to TF32, and
    "medium" to bfloat16, on recent CPUs too. Forward passes bear that. A factor of an ill-conditioned Gram does not.
    """
    # torch.get_float32_matmul_precision fails where both of torch's interfaces were used; these attributes never do.
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
