"""How the package's Protocols look at run time."""

import inspect
from typing import Any, TypeVar

Interface = TypeVar("Interface", bound=type)


def compared_by_name(protocol: Interface) -> Interface:
    """
    Makes `Any` of the annotations of a Protocol's methods at run time; type checkers read them in the source.

    Where an argument's type is a Protocol, jsonargparse (`LightningCLI`) takes the classes whose methods have the same
    parameters, and it wants annotations to be equal: a narrower result, `Tensor` in place of a shape, and even the same
    shape written twice are refused. It compares nothing with `Any`.
    """
    for member in vars(protocol).values():
        # jaxtyping, where it checks signatures, wraps methods.
        while inspect.isfunction(member):
            member.__annotations__ = dict.fromkeys(member.__annotations__, Any)
            member = getattr(member, "__wrapped__", None)
    return protocol
