"""What importing costs: nothing for the package, torch for its core, and no more than Lightning for pruning."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from launch import cold, good

import prune_callbacks
from prune_callbacks.memory import peak_memory

PACKAGE = Path(prune_callbacks.__file__).parent
HEAVY = ("lightning", "transformers", "deepspeed", "hydra", "datasets", "torchmetrics", "matplotlib", "scipy")
CORE = ("Unstructured", "NM", "Magnitude", "Wanda", "SparseGPT", "MRP", "ALPS", "Gram", "MaskSet")
LATE = (
    "matplotlib",
    "scipy",
    "sklearn",
    "jinja2",
    "torch._dynamo",
    "datasets",
    "peft",
    "deepspeed",
    "lm_eval",
    "wandb",
    "jsonargparse",
    "resource",
)
"""What is imported where it is used. (Lightning brings some of these along: what counts is who asks.)"""

DRAWS = {"RunReport", "SparsityBenchmark", "SparsityMonitor"}
"""The public names that draw, and so need what draws."""

LOADED = f"""
import json, sys
import prune_callbacks
loaded = {{"": [m for m in {HEAVY!r} if m in sys.modules]}}
for name in sys.argv[1:]:
    getattr(prune_callbacks, name)
    loaded[name] = [m for m in {HEAVY!r} if m in sys.modules]
print(json.dumps(loaded))
"""

ASKED = """
import builtins, json, sys
import prune_callbacks
late, original = json.loads(sys.argv[1]), builtins.__import__
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").startswith("prune_callbacks") and not level:
        names = [name, *(f"{name}.{part}" for part in fromlist or ())]
        asked.update(l for l in late for n in names if n == l or n.startswith(l + "."))
    return original(name, globals, locals, fromlist, level)
builtins.__import__, found = watched, {}
for name in prune_callbacks.__all__:
    asked = set()
    getattr(prune_callbacks, name)
    found[name] = sorted(asked)
print(json.dumps(found))
"""


def said_by(code, *arguments):
    return json.loads(good(cold(sys.executable, "-c", code, *arguments)).stdout.splitlines()[-1])


def test_the_package_imports_nothing_and_its_core_tensors_only():
    loaded = said_by(LOADED, *CORE, "MaskEnforcer")
    assert not any(loaded[name] for name in ("", *CORE))
    assert "lightning" in loaded["MaskEnforcer"]  # control
    assert "deepspeed" not in loaded["MaskEnforcer"]


@pytest.fixture(scope="module")
def asked():
    """Of every public name: what modules of the package ask for while it is imported, that is named in LATE."""
    return said_by(ASKED, json.dumps(LATE))


def test_without_the_system_call_for_it_no_peak_is_known(monkeypatch):
    assert peak_memory(torch.device("cpu")) > 1e8
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows has none
    assert peak_memory(torch.device("cpu")) == 0


def test_what_only_some_functions_need_is_imported_by_them(asked):
    assert set(asked) == set(prune_callbacks.__all__)
    assert {name: found for name, found in asked.items() if found and name not in DRAWS} == {}


def test_control_what_draws_imports_what_draws(asked):
    assert {"matplotlib", "jinja2"} == set(asked["RunReport"])


def test_signatures_are_checked(request):
    """The control of `make test`'s option: without it, or with a hook that checks nothing, this raises nothing."""
    if not request.config.getoption("jaxtyping_packages"):
        pytest.skip("runs under --jaxtyping-packages, as make test does")
    with pytest.raises(jaxtyping.TypeCheckError, match="keep_largest"):
        importlib.import_module("prune_callbacks.sparsity").keep_largest(torch.arange(4), 2)  # of floats
    with pytest.raises(jaxtyping.TypeCheckError, match="NM.keep"):
        prune_callbacks.NM(2, 4).keep(torch.rand(2, 2, 4))  # of matrices


def sources():
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        (r"trainer\.callbacks", {"callbacks/lineup.py"}),
        (r"os\.replace|\.rename\(|\w\.replace\((new|path|folder)\)", {"writing.py"}),
        (r"does not work under|cannot hold masks under \{name\}", {"parallel/strategies.py"}),
        (r"\bds_shape\b", {"parallel/shapes.py"}),
        (
            r"\bbase_layer\b",
            {"anatomy/adapters.py", "adapters/lora.py", "adapters/plain_state.py", "callbacks/lora_recovery.py"},
        ),
    ],
)
def test_some_things_are_done_in_one_place(pattern, places):
    assert {name for name, text in sources().items() if re.search(pattern, text)} == places


CLASSES = (
    "Unstructured|NM|Block|Rows|Columns|Magnitude|Wanda|RIA|Scored|SparseGPT|SparseGPTQ|MRP|ALPS|GPTQ|Structured|"
    "ScorePruner|Compensating|JointPruner|Pruner"
)


def test_patterns_and_pruners_are_asked_and_not_looked_at():
    asked = re.compile(rf"isinstance\([^()]*\b({CLASSES})\b(?!\w)")
    found = {name: asked.findall(text) for name, text in sources().items() if asked.search(text)}
    assert found == {"pruners/joint.py": ["Compensating"]}  # where it is defined
    assert asked.search("if isinstance(pattern, NM):")  # the control


def long_functions(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[ast.get_docstring(node) is not None :]
            lines = text.splitlines()[first[0].lineno - 1 : node.end_lineno] if first else []
            if sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines) > 40:
                yield node.name


def test_files_and_functions_stay_readable():
    assert [name for name, text in sources().items() if len(text.splitlines()) > 250] == []
    assert {name: found for name, text in sources().items() if (found := list(long_functions(text)))} == {}
    body = "\n".join(f"    a{i} = {i}" for i in range(41))
    assert list(long_functions(f"def f():\n{body}\n")) == ["f"]  # the control
