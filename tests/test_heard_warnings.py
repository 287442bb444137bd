"""What a fit adds to its report and page: warnings, and the command that repeats it."""

import copy
import json
import sys
import warnings

import pytest
from fits import trainer_of
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from runs import words

from prune_callbacks import NM, CausalLM, Magnitude, MaskEnforcer, OneShotPrune, RunReport, TokenDataModule
from prune_callbacks.recorded_warnings import MOST, RecordedWarnings
from prune_callbacks.storage.commands import repeat_command
from prune_callbacks.tasks import PythonDocs


@pytest.fixture
def fit(tmp_path, tokenizer):
    """Fits a module for a step with these callbacks."""

    def fit(module, *callbacks):
        corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
        windows = {"train_windows": 8, "calibration_windows": 2, "evaluation_windows": 2}
        data = TokenDataModule(tokenizer, *corpora, seq_len=32, **windows)
        trainer_of(list(callbacks), tmp_path, max_steps=1, accumulate_grad_batches=1).fit(module, datamodule=data)

    return fit


def test_a_fit_writes_its_page_and_its_warnings(tmp_path, tiny, fit):
    class Warns(CausalLM):
        def on_train_batch_start(self, batch, batch_idx):
            warnings.warn("mind this", stacklevel=1)
            warnings.warn("soon gone", FutureWarning, stacklevel=1)
            warnings.warn("soon gone, perhaps", PossibleUserWarning, stacklevel=1)

    before = warnings.showwarning
    report = RunReport(tmp_path / "run", model="tiny", progress=False)
    with pytest.warns(UserWarning, match="will not last"):
        fit(Warns(tiny), report, OneShotPrune(Magnitude(NM(2, 4)), progress=False))
    assert warnings.showwarning is before
    written = json.loads((tmp_path / "run/report.json").read_text())
    assert [text for text in written["warnings"] if "mind" in text] == ["mind this"]
    assert sum("will not last" in text for text in written["warnings"]) == 1
    assert not any("gone" in text for text in written["warnings"])
    assert written["command"] is None  # pytest's own is not one
    text = words((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    assert "mind this" in text
    assert "pruned weights are not zero. The masks did not hold" in text
    assert "not complete" not in text


@pytest.mark.parametrize("where", ["setup", "on_train_start"])
def test_a_fit_that_fails_listens_no_more(tmp_path, tiny, fit, where):
    class Fails(OneShotPrune):
        pass

    def fail(*_, **__):
        assert warnings.showwarning is not before
        raise ArithmeticError("on purpose")

    setattr(Fails, where, fail)
    before = warnings.showwarning
    report = RunReport(tmp_path / "run", progress=False)
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(CausalLM(tiny), report, Fails(Magnitude(NM(2, 4)), progress=False), MaskEnforcer())
    assert warnings.showwarning is before


def test_a_resumed_fit_goes_on_with_warnings_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe=a", "output_dir=b"])
    first = RunReport(tmp_path)
    first.run.warnings += ["one", "two"]
    state = copy.deepcopy(first.state_dict())
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe=a", "output_dir=b", "ckpt_path=c", "more=1"])
    second = RunReport(tmp_path)
    second.run.warnings += ["three", "two"]
    second.load_state_dict(state)
    assert second.record["warnings"] == ["one", "two", "three"]
    assert second.record["command"] == "python train.py recipe=a"


def test_others_who_listen_are_left_in_their_place():
    heard, ours = [], RecordedWarnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        ours.start()
        inner = warnings.showwarning
        warnings.showwarning = lambda message, *rest: (heard.append(str(message)), inner(message, *rest))
        warnings.warn("first", stacklevel=1)
        theirs = warnings.showwarning
        ours.stop()
        assert warnings.showwarning is theirs
        warnings.warn("second", stacklevel=1)
    assert heard == ["first", "second"]
    assert ours.texts == ["first"]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        ours.start()
        for count in range(2 * MOST):
            warnings.warn(f"{count} is too many", stacklevel=1)
        ours.stop()
    assert len(ours.texts) == MOST


def test_hints_are_not_kept():
    with warnings.catch_warnings(record=True) as shown, RecordedWarnings(but=PossibleUserWarning) as heard:
        warnings.simplefilter("always")
        warnings.warn("perhaps", PossibleUserWarning, stacklevel=1)
        warnings.warn("told", stacklevel=1)
    assert heard.texts == ["told"]
    assert [str(warning.message) for warning in shown] == ["perhaps", "told"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/x/train.py", "recipe=a", "output_dir=runs/1", "k=v w"], "python train.py recipe=a 'k=v w'"),
        (["train.py", "+output_dir=1", "recipe=a", "ckpt_path=x.ckpt"], "python train.py recipe=a"),
        (["/usr/bin/pytest", "recipe=a"], None),
        ([""], None),
        ([], None),
    ],
)
def test_the_command_that_repeats_a_run(argv, line):
    assert repeat_command(argv) == line
