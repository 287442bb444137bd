"""Checks the arguments that a configuration gives to classes and functions, before any is called."""

import inspect
import os
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from prune_callbacks.command_line.keys import REFERENCE, nearest

TARGET = "_target_"
OWN = {TARGET, "_partial_", "_convert_", "_recursive_", "_args_"}
"""What a node says about its call, beside the arguments."""

VARIABLE = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    str: "text",
    Path: "text",
}


def check_arguments(config: Mapping[str, Any], given: Collection[str], resolve: Callable[[str], Any]) -> None:
    """
    Raises ValueError if a class does not take an argument, lacks one, or was given a value of another type.

    Types are checked where the annotation says enough, and of `given` keys only: other values are the recipe's.

    Args:
        config: the nested configuration, its references unresolved; mappings with `_target_` name a class or function.
        given: keys that were set on the command line.
        resolve: returns the value of a key, its references resolved.
    """
    for path, node in _targets(config):
        if f"{path}.{TARGET}" in given:
            _check_target(path, str(node[TARGET]))
        try:
            target = pkgutil.resolve_name(str(node[TARGET]))
            parameters = inspect.signature(target).parameters
        except (ImportError, AttributeError, ValueError, TypeError):
            continue  # the call itself says what is wrong
        _check_names(path, node, parameters, given)
        hints = _hints(target)
        for name in node.keys() & parameters.keys() & hints.keys():
            key = f"{path}.{name}"
            reference = REFERENCE.fullmatch(node[name]) if isinstance(node[name], str) else None
            origin = reference[1] if reference else key
            if any(f"{one}.".startswith(f"{g}.") for one in (key, origin) for g in given):
                _check_type(key if not reference else origin, resolve(key), hints[name], parameters[name].default)


def check_named(config: Mapping[str, Any], groups: Collection[str]) -> None:
    """Raises ValueError if an entry of a group, such as the callbacks, names no class."""
    for group in groups:
        for name, node in config[group].items():
            if not (isinstance(node, Mapping) and TARGET in node) and not str(node).startswith("${"):
                raise ValueError(
                    f"{group}.{name} has no {TARGET} that names a class, got {_written(node)}. "
                    f"~{group}.{name} leaves it out"
                )


def accepted(target: str) -> list[str]:
    """Returns the names of the arguments that a class or function takes; none if it cannot be imported."""
    try:
        parameters = inspect.signature(pkgutil.resolve_name(target)).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    return [parameter.name for parameter in parameters if parameter.kind not in VARIABLE]


def _targets(values: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields all mappings with a `_target_`, with their keys."""
    if isinstance(values, Mapping):
        if TARGET in values:
            yield path, values
        for name, value in values.items():
            yield from _targets(value, f"{path}.{name}" if path else name)


def _check_target(path: str, target: str) -> None:
    """Raises ValueError if a class is not where it should be, in a module that is there."""
    module, _, name = target.rpartition(".")
    try:
        found = pkgutil.resolve_name(module)
    except (ImportError, AttributeError, ValueError):
        return  # the call itself says what is wrong
    if not hasattr(found, name):
        near = [f"{module}.{other}" for other in nearest(name, [*dir(found), *getattr(found, "__all__", ())])]
        advice = f". The nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"{path}.{TARGET}={target}: {module} has no {name}{advice}")


def _check_names(
    path: str, node: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], given: Collection[str]
) -> None:
    """Raises ValueError on arguments that there are not, or that there must be."""
    names = [name for name, parameter in parameters.items() if parameter.kind not in VARIABLE]
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in [name for name in node if name not in OWN and name not in names]:
            near = "".join(f" The nearest is {path}.{other}." for other in nearest(name, names, count=1))
            if not any(f"{path}.{name}.".startswith(f"{key}.") for key in given):
                near += f" The recipe sets {path}.{name}: choose another recipe, or other options of its groups."
            takes = f"It takes {', '.join(names)}" if names else "It takes none"
            raise ValueError(f"{path}.{name}: {node[TARGET]} has no argument {name}.{near} {takes}")
    if not node.get("_partial_") and "_args_" not in node:
        for name in names:
            if parameters[name].default is inspect.Parameter.empty and name not in node:
                raise ValueError(f"{path}.{name} is missing: {node[TARGET]} needs it")


def _hints(target: Any) -> dict[str, Any]:
    """Returns the annotations of a call, without those that name what is not imported there."""
    call = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    found: dict[str, Any] = {}
    for name, annotation in getattr(call, "__annotations__", {}).items():
        with suppress(NameError, TypeError, AttributeError):
            one = types.SimpleNamespace(__annotations__={name: annotation})
            found |= typing.get_type_hints(one, globalns=getattr(call, "__globals__", {}))
    return found


def _check_type(key: str, value: Any, annotation: Any, default: Any) -> None:
    """Raises ValueError if a value is of none of the annotated types."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = list(typing.get_args(annotation)) if union else [annotation]
    if default is None:
        members.append(type(None))
    if any(_accepts(member, value) for member in members):
        return
    classes = [f"a {getattr(member, '__name__', member)}" for member in members]
    wanted = list(dict.fromkeys(name for name in map(_name, members) if name)) or classes
    advice = f""". Text of digits needs quotes within quotes: "{key}='{value}'\"""" if "text" in wanted else ""
    raise ValueError(f"{key} must be {' or '.join(wanted)}, got {_written(value)}{advice}")


def _accepts(member: Any, value: Any) -> bool:
    """Returns whether a value may be of an annotated type; True where that cannot be said."""
    if typing.get_origin(member) is typing.Literal:  # the class itself says which ones
        return any(type(value) is type(choice) for choice in typing.get_args(member))
    kind = typing.get_origin(member) or member
    if not isinstance(kind, type) or kind is object:
        return True
    if isinstance(value, Mapping | list):
        return kind not in NAMES or TARGET in value
    if isinstance(value, str):
        return issubclass(kind, str | os.PathLike | Enum)
    if isinstance(value, bool | None):
        return kind is type(value)
    return kind is float or kind is type(value) if isinstance(value, int | float) else True


def _name(member: Any) -> str:
    """Names an annotated type whose values can be typed; empty for others."""
    kind = typing.get_origin(member) or member
    if kind is typing.Literal:
        choices = (f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in typing.get_args(member))
        return " or ".join(choices)
    if isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str:
        return "a list such as [a,b]"
    return NAMES.get(kind, "")


def _written(value: Any) -> str:
    """Writes a value as the command line does."""
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else repr(value)
