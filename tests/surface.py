"""
The public names with their signatures, one a line: `python tests/surface.py` writes `public_surface.txt` anew.

Do so, and say it in CHANGELOG.md, if a name or a signature changes on purpose.
"""

import enum
import importlib
import inspect
import re
from pathlib import Path

MODULES = (
    "prune_callbacks",
    "prune_callbacks.extend",
    "prune_callbacks.adapters",
    "prune_callbacks.deploy",
    "prune_callbacks.measure",
    "prune_callbacks.pruners",
    "prune_callbacks.solvers",
    "prune_callbacks.sparsity",
    "prune_callbacks.streaming",
    "prune_callbacks.studies",
    "prune_callbacks.tasks",
)
FROZEN = Path(__file__).with_name("public_surface.txt")


def signature(thing):
    """Names and defaults of the arguments; annotations are mypy's business."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<(function|class|factory|[\w.]+ object)[^<>]*(<[^<>]*>)?[^<>]*>", r"<\1>", text)


def members(kind):
    """Public methods and properties that a class of the package defines, of itself or of a base of the package."""
    for name in sorted(dir(kind)):
        owner = next((base for base in kind.__mro__ if name in vars(base)), object)
        if not name.startswith("_") and owner.__module__.startswith("prune_callbacks"):
            value = vars(owner)[name]
            function = getattr(value, "__func__", value)
            yield f".{name}{signature(function) if inspect.isfunction(function) else ''}"


def surface():
    lines = []
    for module in MODULES:
        loaded = importlib.import_module(module)
        for name in sorted(loaded.__all__):
            thing = getattr(loaded, name)
            lines.append(f"{module}.{name}{signature(thing)}")
            if inspect.isclass(thing) and not issubclass(thing, enum.Enum) and module != "prune_callbacks.extend":
                lines += [f"{module}.{name}{member}" for member in members(thing)]
    return lines


if __name__ == "__main__":
    FROZEN.write_text("\n".join(surface()) + "\n", encoding="utf-8")
