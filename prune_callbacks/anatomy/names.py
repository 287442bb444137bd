"""Dotted names of modules, and errors that name a layer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def inside(name: str, module: str) -> bool:
    """Returns whether a dotted name is that of `module` or of a member of it."""
    return f"{name}.".startswith(f"{module}.")


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Prefixes ValueErrors and warnings raised in the `with` block by the layer's name."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except ValueError as error:
        raise type(error)(f"layer {layer}: {error}") from error
    for warning in caught:
        warnings.warn(f"layer {layer}: {warning.message}", warning.category, stacklevel=4)
