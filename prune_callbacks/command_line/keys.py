"""Finds the keys that a command may have meant, and those that nothing would read."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""A reference from one value to another key."""

LIKE, SPREAD, WHOLE = 0.62, 0.15, 0.85
"""The likeness from which a word is near; how much less than the best; from which the places of dots do not matter."""


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by keys with dots; mappings inside have keys of their own."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        found[key] = value
        if isinstance(value, Mapping):
            found |= flat(value, key)
    return found


def missing_keys(values: Mapping[str, Any]) -> list[str]:
    """Returns keys that the command line must set; OmegaConf's own version fails on references to such keys."""
    return [key for key, value in flat(values).items() if value == "???"]


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """Returns the words most like `word`, the best first. What is behind the last dot counts most."""

    def ratio(one: str, other: str) -> float:
        part = bool(one) and one.lower() in other.lower().split("_")  # epochs in max_epochs
        return 0.9 if part and one != other else SequenceMatcher(None, one.lower(), other.lower()).ratio()

    def likeness(other: str) -> float:
        (outer, _, last), (other_outer, _, other_last) = word.rpartition("."), other.rpartition(".")
        whole = ratio(word, other)
        return max(ratio(last, other_last) * (0.8 + 0.2 * ratio(outer, other_outer)), whole if whole > WHOLE else 0)

    near = {other: likeness(other) for other in words}
    best = max(near.values(), default=0)
    kept = [other for other in near if near[other] >= max(LIKE, best - SPREAD)]
    return sorted(kept, key=lambda other: (-near[other], len(other), other))[:count]


def no_such_option(group: str, option: str, options: Sequence[str]) -> str:
    """Returns the sentence on an option that a group does not have."""
    near = [f"{group}={name}" for name in nearest(option, options)]
    said = f"Could not find '{group}/{option}'. {_nearest(near)}".rstrip()
    none = f" ~{group} leaves it out." if option == "null" and group != "recipe" else ""
    return f"{said} {group}= takes one of {', '.join(sorted(options))}.{none}"


def no_such_flag(flag: str, flags: Iterable[str]) -> str:
    """Returns the sentence on an option with dashes that there is not, or on a word that argparse did not read."""
    if not flag.startswith("-"):
        return (
            f"{flag} cannot be read there: write options with dashes, such as --multirun, in front of all other words"
        )
    name, _, value = flag.lstrip("-").partition("=")
    advice = _nearest(nearest(flag, flags)) or f"Recipes and keys are written without dashes: {name}={value or '...'}"
    return f"There is no option {flag}. {advice}"


def no_such_key(
    key: str,
    value: str,
    config: Mapping[str, Any],
    *,
    groups: Iterable[str],
    owners: Sequence[str],
    takes: Sequence[str] = (),
    sign: str = "",
) -> str:
    """
    Returns the sentence on a key that a configuration does not have, with the nearest ones to type.

    Args:
        key: what was typed in front of "=".
        value: what was typed behind it, with the "="; empty where a key was to be removed.
        config: the nested configuration; its key `name` is that of the recipe.
        groups: keys that are set by the name of an option.
        owners: options and recipes that do have the key.
        takes: keys that may be added, since the class there takes such an argument.
        sign: "+" or "++" where the key was to be added, "~" where it was to be removed.
    """
    recipe, there = f"recipe={config.get('name')}", flat(config)
    said = f"There is no key {key} in {recipe}"
    if "+" in sign:
        said = f"Nothing in {recipe} reads a key {key}: {sign}{key}{value} would be ignored, and is refused"
    said += f"; it is a key of {', '.join(owners)}. " if owners else ". "
    settable = {name for name, found in there.items() if sign == "~" or not isinstance(found, Mapping)} | set(groups)
    if not key.rpartition(".")[2].startswith("_"):
        settable = {name for name in settable if not name.rpartition(".")[2].startswith("_")}
    written = {name: f"{sign.replace('+', '')}{name}{value}" for name in settable}
    written = {name: f"+{name}{value}" for name in takes if name not in there} | written
    near = [] if owners else nearest(key, written)  # what other recipes have is not misspelt
    alone = "" if sign or takes else " A key that nothing reads cannot be added with +."
    if near:
        return said + _nearest([written[name] for name in near]) + alone
    inside = there.get(key.rpartition(".")[0])
    if isinstance(inside, Mapping):
        names = [name for name in inside if not name.startswith("_")]
        return f"{said}{key.rpartition('.')[0]} has {', '.join(names) or 'no keys'}.{alone}"
    return f"{said}python train.py --help {recipe} lists its keys.{alone}"


def is_read(key: str, config: Mapping[str, Any], roots: Iterable[str]) -> bool:
    """Returns whether `key` lies in one of the `roots`, or in what they refer to, and so on."""
    keys, reached, waiting = flat(config), set[str](), list(roots)
    while waiting:
        root = waiting.pop()
        if root not in reached:
            reached.add(root)
            waiting += [name for text in _texts(keys.get(root)) for name in REFERENCE.findall(text)]
    return any(f"{key}.".startswith(f"{root}.") or root.startswith(f"{key}.") for root in reached)


def referred_to(key: str, config: Mapping[str, Any]) -> str | None:
    """Returns `key` by way of the reference that it passes through; None if it passes through none."""
    keys, parts = flat(config), key.split(".")
    for depth in range(1, len(parts)):
        value = keys.get(".".join(parts[:depth]))
        if isinstance(value, str) and (reference := REFERENCE.fullmatch(value)):
            return ".".join([reference[1], *parts[depth:]])
    return None


def _nearest(near: Sequence[str]) -> str:
    """Names what is near, as a sentence."""
    return f"The nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}." if near else ""


def _texts(value: Any) -> Iterator[str]:
    """Yields all texts inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
