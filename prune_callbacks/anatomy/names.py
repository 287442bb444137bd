"""Dotted names of modules, and errors that name a layer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def dotted(*names: str) -> str:
    """Joins names by dots; empty ones, such as that of a whole model, are left out."""
    return ".".join(filter(None, names))


def inside(name: str, module: str) -> bool:
    """Returns whether a dotted name is that of `module` or of a member of it."""
    return f"{name}.".startswith(f"{module}.")


def belongs(name: str, part: str) -> bool:
    """Returns whether a name is that of a part of a model or of a member of it; all belong to the whole model, ""."""
    return not part or inside(name, part)


def names_by_tensor(module: nn.Module) -> dict[int, list[str]]:
    """Returns the names of every tensor in a module's `state_dict`, by the tensor's id; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return names


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
