"""The public names and their signatures are frozen; changing them is a decision, written down."""

import inspect
import json
from dataclasses import dataclass

import pytest
import torch
from surface import FROZEN, MODULES, signature, surface

import prune_callbacks
from prune_callbacks import NM, LoRARecovery, Magnitude, OneShotPrune
from prune_callbacks.results import Result


def test_public_names_and_signatures_are_the_frozen_ones():
    frozen = FROZEN.read_text(encoding="utf-8").splitlines()
    found = surface()
    gone, new = sorted(set(frozen) - set(found)), sorted(set(found) - set(frozen))
    assert (gone, new) == ([], []), "if this is meant, run python tests/surface.py and say so in CHANGELOG.md"
    assert len(found) > 200


def test_control_a_change_of_a_signature_shows():
    assert signature(lambda a, *, b=3: a) != signature(lambda a, b=3: a)
    assert signature(lambda a: a) != signature(lambda b: b)


def test_what_is_public_is_listed_once_and_says_what_it_does():
    assert len(set(MODULES)) == len(MODULES)
    silent = [name for name in prune_callbacks.__all__ if not inspect.getdoc(getattr(prune_callbacks, name))]
    assert silent == []


def test_arguments_behind_the_second_are_given_by_name():
    """Of functions and callbacks; values (patterns, pruners, schedules, records) may take theirs by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrong = {}
    for name in prune_callbacks.__all__:
        thing = getattr(prune_callbacks, name)
        if not (inspect.isfunction(thing) or "callbacks" in thing.__module__.split(".")):
            continue
        optional = [
            p.name
            for p in list(inspect.signature(thing).parameters.values())[2:]
            if p.kind in kinds and p.default is not inspect.Parameter.empty
        ]
        if optional:
            wrong[name] = optional
    # DESIGN: prune_checkpoint(source, target, pruner, batches).
    assert wrong == {"prune_checkpoint": ["batches"], "Rewind": ["dirpath"]}


def test_results_are_plain_values_too(tiny):
    report = prune_callbacks.prune_sequentially(tiny, None, Magnitude(NM(2, 4)), progress=False)
    assert isinstance(report, Result)
    plain = report.to_dict()
    assert plain["layers"][0]["name"] == "model.layers.0.self_attn.q_proj.weight"
    assert plain["skipped"] == {}
    assert "masks" not in plain


@pytest.mark.parametrize(
    "make", [lambda **k: OneShotPrune(Magnitude(NM(2, 4)), **k), lambda **k: LoRARecovery(masked=False, **k)]
)
def test_the_old_name_of_the_folder_still_works(make, tmp_path):
    with pytest.warns(FutureWarning, match="save_dir= is now dirpath="):
        assert make(save_dir=tmp_path).dirpath == tmp_path
    assert make(dirpath=tmp_path).dirpath == tmp_path


def test_both_names_of_the_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="save_dir= is the old name of dirpath="):
        OneShotPrune(Magnitude(NM(2, 4)), dirpath=tmp_path, save_dir=tmp_path)


@dataclass(frozen=True)
class Odd(Result):
    numbers: object


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ([1.0, float("nan")], {"numbers": [1.0, None]}),
        ([torch.zeros(2)], {}),
        ({"a": torch.zeros(2)}, {}),
        ({3, "x"}, {"numbers": [3, "x"]}),
        ((1, ("a", None)), {"numbers": [1, ["a", None]]}),
    ],
)
def test_a_result_is_json(value, plain):
    assert Odd(value).to_dict() == plain
    json.dumps(Odd(value).to_dict(), allow_nan=False)
