"""What importing costs, and that the public names are those of the contract."""

import subprocess
import sys

import pytest

HEAVY = ("lightning", "transformers", "deepspeed", "hydra", "datasets", "torchmetrics", "matplotlib")


def loaded_by(statement):
    code = f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("name", ["Unstructured", "NM", "Magnitude", "Wanda", "SparseGPT", "MRP", "Gram", "MaskSet"])
def test_the_core_imports_tensors_only(name):
    assert loaded_by(f"from prune_callbacks import {name}") == []


def test_importing_the_package_imports_nothing():
    assert loaded_by("import prune_callbacks") == []


def test_control_the_callbacks_do_import_lightning():
    assert "lightning" in loaded_by("from prune_callbacks import MaskEnforcer")
