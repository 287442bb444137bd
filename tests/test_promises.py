"""Every promise has a test in `make test`, and every test that is named exists."""

from pathlib import Path

import mutants
import pytest
from promises import PROMISES, RECIPES

HERE = Path(__file__).resolve().parent


@pytest.fixture
def cases(request):
    """Of every test that was collected its cases, each with whether `make test` runs it."""
    config = request.config
    if not {(config.invocation_params.dir / argument).resolve() for argument in config.args} <= {HERE, HERE.parent}:
        pytest.skip("files or tests were named: only those were collected")
    missing = {path.stem for path in HERE.glob("test_*.py")} - {
        item.path.stem for item in request.session.all_collected
    }
    assert not missing, f"nothing was collected from {missing}"
    return {
        f"{item.path.stem}::{item.nodeid.split('::', 1)[1]}": not item.get_closest_marker("slow")
        for item in request.session.all_collected
    }


def those(cases, name):
    return [
        quick
        for case, quick in cases.items()
        if case == name or case.split("[")[0] == name or case.startswith(f"{name}::")
    ]


def test_every_promise_is_held_by_a_test_that_make_test_runs(cases):
    for promise, (held_by, controls) in PROMISES.items():
        for name in (*held_by, *controls):
            assert any(those(cases, name)), f"{promise!r}: {name} is in no test, or only in slow ones"


def test_control_a_slow_test_is_no_guard(cases):
    assert not any(those(cases, "test_smollm2"))
    assert those(cases, "test_smollm2")
    assert not those(cases, "test_smollm2::test_that_is_not_there")


def test_every_recipe_is_run():
    assert set(RECIPES) == {path.stem for path in (HERE.parent / "recipes/recipe").glob("*.yaml")}


def test_every_mutant_fits_the_package():
    """Each replaces a text that is there, so that `python tests/mutants.py` tries them all."""
    assert mutants.check() == []
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 40


def test_every_mutant_names_tests_that_make_test_runs(cases):
    for mutant in mutants.MUTANTS:
        for test in mutant.tests.split():
            assert any(those(cases, test.replace(".py", ""))), f"{mutant.name}: {test} is no test, or only a slow one"
