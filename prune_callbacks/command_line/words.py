"""Checks the words of a command, KEY=VALUE and GROUP=OPTION, against what a recipe has and reads."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_callbacks.command_line.arguments import TARGET, accepted
from prune_callbacks.command_line.keys import flat, is_read, nearest, no_such_key, no_such_option, referred_to

OWN = {"defaults", "hydra"}
"""Keys of train.yaml that Hydra reads."""

TRAINING = ("module", "data", "callbacks", "logger", "trainer")
"""Keys that a training reads, and a job does not."""

ALWAYS = ("job", "name", "output_dir", "seed", "beside", "ckpt_path", "hydra")
"""Keys that every run reads."""


@dataclass(frozen=True)
class Recipes:
    """
    The files of recipes and options.

    Attributes:
        folder: holds train.yaml and a folder for each group.
        load: reads one of the files.
        compose: composes words to nested values, their references unresolved; raises ValueError where it cannot.
    """

    folder: Path
    load: Callable[[Path], Mapping[str, Any]]
    compose: Callable[[list[str]], Mapping[str, Any]]

    def groups(self) -> list[str]:
        """Returns the names of the groups."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir())

    def defaults(self) -> dict[str, str | None]:
        """Returns the option of each group that is taken where neither the recipe nor the command names one."""
        listed = self.load(self.folder / "train.yaml")["defaults"]
        return {group: option for entry in listed if isinstance(entry, Mapping) for group, option in entry.items()}

    def values(self, options: Mapping[str, str | None]) -> dict[str, Any]:
        """Returns the values of train.yaml and of the files of some options, unless none is chosen."""
        values = {name: value for name, value in self.load(self.folder / "train.yaml").items() if name not in OWN}
        files = {group: self.folder / group / f"{option}.yaml" for group, option in options.items()}
        return values | {group: self.load(file) for group, file in files.items() if file.exists()}

    def owners(self, key: str) -> list[str]:
        """Returns the options and recipes in whose files a key is set."""
        found, name = [], key.rpartition(".")[2]
        for file in sorted(self.folder.glob("*/*.yaml")):
            group = file.parent.name
            if f"{name}:" in file.read_text(encoding="utf-8"):  # most are not loaded
                values = self.load(file)
                if key in flat(values if group == "recipe" else {group: values}):
                    found.append(f"{group}={file.stem}")
        return found


@dataclass(frozen=True)
class Word:
    """
    One word of a command.

    Attributes:
        line: the word itself.
        sign: "+", "++" or "~" in front of the key; empty if there is none.
        key: what is set.
        value: its value; None where there is none.
        several: the words for single values, where it lists several; else itself.
        options: what may be chosen, if the key is that of a group; else None.
    """

    line: str
    sign: str
    key: str
    value: Any
    several: tuple[str, ...]
    options: tuple[str, ...] | None = None

    @property
    def chooses(self) -> bool:
        """Whether it chooses an option of a group, in place of setting values or leaving the group out."""
        return self.options is not None and self.sign != "~" and not isinstance(self.value, Mapping)

    @property
    def typed(self) -> str:
        """What stands behind the key, with the "="."""
        return self.line.removeprefix(self.sign).removeprefix(self.key)


def unreadable(line: str, recipes: Sequence[str]) -> str:
    """Returns the sentence on a word that is not KEY=VALUE, or whose value cannot be read."""
    if "=" in line.strip("="):
        return f"{line} cannot be read. A value with spaces, commas, brackets or = needs quotes: \"KEY='a = b'\""
    near = "".join(f": write recipe={name}" for name in nearest(line, recipes, count=1))
    return f"{line} is not KEY=VALUE, without spaces{near}. python train.py --help lists recipes and keys"


def jobs(words: Sequence[Word]) -> list[list[str]]:
    """Returns one command for each combination of options, with the first value of every other key."""
    combinations = itertools.product(*(word.several if word.chooses else word.several[:1] for word in words))
    return [list(combination) for combination in combinations]


def check_choices(words: Sequence[Word]) -> None:
    """Raises ValueError if an option is not there, or a word lists several values for one run."""
    for word in words:
        if word.several != (word.line,):
            listed = ",".join(line.partition("=")[2] for line in word.several)
            advice = "" if word.chooses else f"; a list is {word.key}=[{listed}]"
            raise ValueError(f"{word.line} names several values: --multirun runs once with each{advice}")
        if word.options is None or not word.chooses:
            continue
        if word.key == "recipe" and isinstance(word.value, list):
            raise ValueError(f"{word.line} names several recipes: --multirun recipe=a,b runs one after the other")
        if word.sign:
            raise ValueError(f"{word.line}: a group has one option, which {word.key}{word.typed} chooses, without +")
        for option in word.value if isinstance(word.value, list) else [word.value]:
            if option not in word.options and "/" not in str(option):
                written = "null" if option is None else str(option)
                raise ValueError(no_such_option(word.key, written, word.options))


def culprit(words: Sequence[Word], recipes: Recipes, reason: str) -> str:
    """
    Returns the sentence on the first word without which the words before it could be composed.

    Args:
        words: of one run, their options checked.
        recipes: what they are composed of.
        reason: why all of them cannot be composed.
    """
    lines = _choices(words)
    others = [word for word in words if word.line not in lines]
    try:
        config = recipes.compose(lines)
        for word in others:
            before, lines = config, [*lines, word.line]
            try:
                config = recipes.compose(lines)
            except ValueError as error:
                return _refused(word, before, recipes, str(error))
    except ValueError as error:
        return str(error)
    return reason


def check_read(words: Sequence[Word], config: Mapping[str, Any], recipes: Recipes) -> None:
    """Raises ValueError if something was added that nothing reads, or removed that every run reads."""
    trains = config.get("job") is None
    roots = (*ALWAYS, *TRAINING) if trains else ALWAYS
    base = recipes.compose(_choices(words)) if any(word.sign for word in words) else config
    there = flat(base)
    for word in words:
        key, top = word.key, word.key.partition(".")[0]
        if top == "hydra" or "/" in key:
            continue
        if word.sign == "~" and key == top and key in base and key not in config:
            raise ValueError(f"{word.line}: a run needs {key}; {_parts(key, base[key])}")
        if "+" in word.sign and key not in there:
            if direct := referred_to(key, base):
                raise ValueError(
                    f"{word.line} would replace what is behind {key}: write {word.sign}{direct}{word.typed}"
                )
            if not is_read(key, config, roots):
                raise ValueError(_unknown(word, key, base, recipes))
        # Jobs leave out what trainings read, and smoke=true chooses it for both.
        unused = key != "recipe" and (trains or recipes.defaults().get(key, key) is None)
        if word.chooses and unused and not is_read(key, config, roots):
            raise ValueError(f"{word.line} would be ignored: nothing in recipe={config['name']} reads {key}")


def _choices(words: Sequence[Word]) -> list[str]:
    """Returns the words that decide which keys there are before any is set, added or removed."""
    return [word.line for word in words if word.chooses or word.key == "hydra.searchpath"]


def _refused(word: Word, config: Mapping[str, Any], recipes: Recipes, reason: str) -> str:
    """Returns the sentence on a word that cannot be added to a configuration."""
    there = flat(config)
    keys = [word.key, *(flat(word.value, word.key) if isinstance(word.value, Mapping) else ())]
    missing = next((key for key in keys if key not in there), None)
    if missing is None and "+" in word.sign:
        return f"{word.line}: {word.key} is there already; write {word.key}{word.typed}"
    if missing is None:
        return f"{word.line}: {reason}"
    if direct := referred_to(missing, config):
        return f"{word.key} stands for {direct}: write {word.sign}{direct}{word.typed}"
    if missing in _takes(missing, config) and word.sign != "~":
        return f"recipe={config['name']} does not set {missing}; write +{word.line} to add it"
    return _unknown(word, missing, config, recipes)


def _unknown(word: Word, key: str, config: Mapping[str, Any], recipes: Recipes) -> str:
    """Returns the sentence on a key that there is not."""
    values = config if key.startswith("hydra.") else {name: config[name] for name in config if name != "hydra"}
    return no_such_key(
        key,
        word.typed if key == word.key else f"={flat(word.value, word.key)[key]}",
        values,
        groups=() if "." in key else recipes.groups(),
        owners=recipes.owners(key),
        takes=() if word.sign else _takes(key, config),
        sign=word.sign,
    )


def _takes(key: str, config: Mapping[str, Any]) -> list[str]:
    """Returns the keys beside `key` that the class there takes as arguments; none if there is no class."""
    parent = key.rpartition(".")[0]
    node = flat(config).get(parent)
    names = accepted(str(node[TARGET])) if isinstance(node, Mapping) and TARGET in node else []
    return [f"{parent}.{name}" for name in names]


def _parts(key: str, value: Any) -> str:
    """Says what else may be left out."""
    names = [f"~{key}.{name}" for name in value if not name.startswith("_")] if isinstance(value, Mapping) else []
    return f"{' and '.join(names[:3])} leave out parts of it" if names else f"{key}=... sets it"
