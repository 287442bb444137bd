"""The name of a function that is the same in every process, and another one if the function does something else."""

import functools
import hashlib
from types import CodeType, FunctionType
from typing import Any


def identity(function: Any) -> str:
    """
    Returns the name of a function with a hash of its code, its defaults and the values that it captures.

    The name of a class or of a function without Python code (`torch.abs`) is returned alone; a partial is written with
    its function and arguments, any other object as its `repr`.
    """
    if isinstance(function, functools.partial):
        settings = [*map(_value, function.args), *(f"{k}={_value(v)}" for k, v in function.keywords.items())]
        return f"partial({', '.join([identity(function.func), *settings])})"
    if not hasattr(function, "__qualname__"):
        return repr(function)
    name = plain_name(function)
    if not isinstance(function, FunctionType):
        return name
    captured = [_value(cell.cell_contents) for cell in function.__closure__ or ()]
    settings = [*map(_value, function.__defaults__ or ()), *map(_value, (function.__kwdefaults__ or {}).items())]
    text = repr((_code(function.__code__), captured, settings))
    return f"{name}#{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plain_name(function: Any) -> str:
    """Returns the qualified name of a function without the functions around it; the `repr` of an object without one."""
    return str(getattr(function, "__qualname__", repr(function))).rpartition("<locals>.")[2]


def _value(value: Any) -> str:
    return identity(value) if callable(value) else repr(value)


def _code(code: CodeType) -> tuple[Any, ...]:
    """Returns code as values without addresses: functions inside of it are code, too."""
    constants = [_code(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return code.co_code, constants, code.co_names
