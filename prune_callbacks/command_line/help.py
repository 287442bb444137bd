"""Writes the help of train.py out of the recipes' own comments and values."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_callbacks.command_line.keys import flat

USAGE = """\
python train.py recipe=NAME [GROUP=OPTION ...] [KEY=VALUE ...]

  python train.py recipe=wanda_50 smoke=true                 every stage on a tiny model, in seconds
  python train.py recipe=wanda_50 pattern.sparsity=0.6 model=pretrained model.path=FOLDER_OR_HUB_ID
  python train.py --help recipe=wanda_50                     the keys of this recipe, with their values
  python train.py --cfg job recipe=wanda_50                  its whole configuration
  python train.py --multirun recipe=sweep pruner=wanda,mrp   one run with each
  python train.py --hydra-help                               options of Hydra, which reads the command line

+KEY=VALUE adds an argument that a class takes and the recipe does not set; ~KEY leaves one out.
"""

SETTING = re.compile(r"(\w+): .*? # (.+)")
"""A key of train.yaml with a comment: one that people set."""

HIDDEN = {"name", "along", "smoke_overrides", "recipe_smoke_overrides"}
"""Keys that recipes set and people do not."""


def sentence(file: Path) -> str:
    """Returns the first sentence of the comment at the top of a YAML file, without the command of a recipe."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @package", "# python train.py")):
            lines.append(line.strip("# "))
    return re.split(r"(?<!\.)\. ", " ".join(lines))[0].rstrip(".")


def recipe_list(folder: Path, width: int) -> str:
    """Returns the names of all recipes with their sentences."""
    return _table({file.stem: sentence(file) for file in sorted((folder / "recipe").glob("*.yaml"))}, width)


def help_text(folder: Path, config: Mapping[str, Any], options: Mapping[str, str | None], width: int) -> str:
    """
    Returns the help: recipes, groups with their options, keys with their values.

    Args:
        folder: that of train.yaml, with a folder for each group.
        config: nested values of the keys.
        options: the option of each group that these values are of; None: none of them.
        width: of a line.
    """
    parts = [USAGE, "Recipes, recipe=NAME:", recipe_list(folder, width)]
    for group in sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "recipe"):
        chosen = options.get(group)
        parts.append(f"\n{group}=, here {chosen}:" if chosen else f"\n{group}=, here none of:")
        parts.append(_table({file.stem: sentence(file) for file in sorted((folder / group).glob("*.yaml"))}, width))
    lines = (folder / "train.yaml").read_text(encoding="utf-8").splitlines()
    comments = {found[1]: found[2] for line in lines if (found := SETTING.fullmatch(line))}
    recipe = f" of recipe={config['name']}" if config.get("name", "???") != "???" else ""
    parts.append(f"\nKeys{recipe}, KEY=VALUE, with their values:")
    parts.append(_table({f"{key}={_written(config.get(key))}": comment for key, comment in comments.items()}, width))
    for key, value in flat(config).items():
        own = key.rpartition(".")[2].startswith("_") or key in comments or key in HIDDEN
        if not own and not isinstance(value, Mapping) and "${" not in str(value):
            parts.append(f"  {key}={_written(value)}")
    return "\n".join(parts)


def _written(value: Any) -> str:
    """Writes a value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else str(value)


def _table(rows: Mapping[str, str], width: int) -> str:
    """Returns rows of a name and a text beside it, wrapped."""
    indent = min(max(map(len, rows)), 30) + 4
    return "\n".join(
        textwrap.fill(text, width, initial_indent=f"  {name}".ljust(indent - 2) + "  ", subsequent_indent=" " * indent)
        for name, text in rows.items()
    )
