"""Runs side by side, and the command line that puts them there."""

import json
import re
import shutil
import sys

import pytest
from launch import cold
from runs import NAMES, RECORD, make_run, perplexity, words

from prune_callbacks.reporting.comparison import grouped, main, write_comparison
from prune_callbacks.reporting.summary import summary_table
from prune_callbacks.storage.run_folder import read_run
from prune_callbacks.storage.run_record import STAGES, RunRecord


@pytest.fixture
def make(tmp_path):
    return lambda name="run", **changes: make_run(tmp_path / name, **changes)


def test_runs_side_by_side(tmp_path, make, capsys):
    a = make("a", pruner="Wanda(NM(2, 4))", **perplexity(recovered=6.25))
    b = make("b", violations={NAMES[0]: 3})
    half = make("half", stage="pruned", **perplexity(recovered=None))
    shutil.rmtree(half / "model")
    assert main([str(a), str(b), str(half), "--output", str(tmp_path / "new/both.html")]) == 0
    printed = capsys.readouterr().out
    assert "windows of 2048" in " ".join(printed.split())
    assert "half (not complete)" in printed
    page = (tmp_path / "new/both.html").read_text(encoding="utf-8")
    text = words(page)
    assert "3 runs side by side" in text
    assert "recovered perplexity 6.25 5.50 -" in text
    assert re.findall(r'class="best">([^<]+)<', page) == ["5.50"]
    assert "of what pruning cost, taken back 38 % 75 % -" in text
    assert "b: 3 pruned weights are not zero" in text
    assert "half is not complete: The recovered model's perplexity: training has not come to its end." in text
    assert "dense piqa (acc, 1838 examples) 81.25 % ± 1.00 %" in text
    assert "dense perplexity, C4 validation, 256 windows of 1024 7.25 7.25 7.25" in text
    differing = re.findall(r'<tr class="differs"><th>([^<]+)', page)
    assert differing == ["pruner"]
    assert text.count("cannot be compared") == 0
    assert page.count("<section") == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_the_table_of_a_run_has_its_further_texts_and_tasks(capsys):
    summary_table(RunRecord.from_json(RECORD))
    printed = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["", "C4 validation", "7.25", "9.12", "-", ""] in printed
    assert any(row[1:3] == ["piqa (acc)", "81.2%"] for row in printed)
    summary_table(RunRecord.from_json(RECORD | {"corpora": {}, "zero_shot": {}}))
    assert "further" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "other",
    [{"model": "other"}, {"width": 128}, perplexity(dataset="C4"), perplexity(seq_len=4096)],
    ids=["model", "architecture", "text", "context length"],
)
def test_what_cannot_be_compared_is_split(tmp_path, make, capsys, other):
    folders = [make("a"), make("b"), make("c", **(perplexity(recovered=1.5) | other))]
    if "perplexity" in other:
        (folders[2] / "report.json").write_text(json.dumps(RECORD | other))
    assert main([*map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    first, second = page.split("<section")[1:]
    assert ("<th>a</th>" in first, "<th>b</th>" in first, "<th>c</th>" in first) == (True, True, False)
    assert ("<th>a</th>" in second, "<th>c</th>" in second) == (False, True)
    assert "These runs fall into 2 groups that cannot be compared with each other" in words(page)
    assert words("<section" + second).startswith("Group 2 of 2:")
    assert "do not compare across" in capsys.readouterr().out


def metrics_only(**metrics):
    """What a run without text has: no perplexity, and a value of every metric at every stage."""
    none = dict.fromkeys(("dataset", "seq_len", "dense", "pruned", "recovered"))
    stages = {name: dict(zip(STAGES, values, strict=True)) for name, values in metrics.items()}
    return {"model": "resnet", "perplexity": none, "corpora": {}, "zero_shot": {}, "metrics": stages}


def test_runs_with_metrics_beside_runs_with_perplexity(tmp_path, make, capsys):
    """Those without perplexity are a group of their own; one that logs other metrics is in it, with dashes."""
    rounds = [
        {"step": step, "sparsity": step / 40, "perplexity": None, "metrics": {"val_loss": 0.5 + step, "val_acc": None}}
        for step in (0, 10, 20)
    ]
    a = make("a", **metrics_only(val_loss=(0.5, 2.25, 0.75), val_acc=(0.93, None, 0.91)), rounds=rounds)
    b = make("b", **metrics_only(val_loss=(0.5, 3.0, 0.8765432), val_auroc=(0.99, 0.5, 0.98)))
    both = make("both", metrics=metrics_only(val_loss=(1.0, 2.0, 1.5))["metrics"])
    assert main([*map(str, (a, b, both)), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    first, second = (words("<section" + part) for part in page.split("<section")[1:])
    assert "resnet (llama, 3 blocks of width 64, 100 tokens), by its own validation metrics" in first
    assert "recovered val_loss 0.75 0.8765 dense val_acc 0.93 - pruned val_acc - - recovered val_acc 0.91 -" in first
    assert "dense val_auroc - 0.99" in first
    assert "erplexity" not in first
    assert "what pruning cost" not in first
    assert "Bold: the lowest" not in first
    assert "Validation metrics of the trained models, round by round" in first
    assert "recovered perplexity 5.50" in second
    assert "of what pruning cost, taken back 75 %" in second
    assert "recovered val_loss 1.5" in second
    assert re.findall(r'class="best">([^<]+)<', page) == []  # which direction is better is not known
    printed = " ".join(capsys.readouterr().out.split())
    assert "│ b │ val_loss │ 0.5 │ 3 │ 0.8765 │" in printed
    assert "│ both │ 5.00 │ 7.00 │ 5.50 │" in printed


def test_runs_that_started_from_other_weights_are_noticed(tmp_path, make):
    write_comparison([make("a"), make("b", **perplexity(dense=5.2))], tmp_path / "page.html")
    assert "did not start from the same weights" in words((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_tasks_measured_on_other_examples_are_not_side_by_side(tmp_path, make):
    fewer = {"piqa": RECORD["zero_shot"]["piqa"] | {"limit": 100, "examples": 100}}
    write_comparison([make("a"), make("b", zero_shot=fewer)], tmp_path / "page.html")
    text = words((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "dense piqa (acc, 1838 examples) 81.25 % ± 1.00 % - " in text
    assert "dense piqa (acc, 100 examples) - 81.25 % ± 1.00 %" in text


def test_unnamed_models_are_told_apart(make):
    runs = {name: read_run(make(name, model=None, width=width)) for name, width in (("a", 8), ("b", 8), ("c", 16))}
    assert [list(group) for group in grouped(runs).values()] == [["a", "b"], ["c"]]


def test_the_command_line(tmp_path, make, capsys):
    folders = [str(make()), str(make("two"))]
    words = [sys.executable, "-W", "error::RuntimeWarning", "-m", "prune_callbacks.reporting", *folders]
    done = cold(*words, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 runs side by side" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert main(folders[:1]) == 0
    assert capsys.readouterr().out == f"wrote {folders[0]}/report.html\n"
    assert "75 %" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "two/report.html").exists()


def test_bad_arguments_are_told_in_a_line(tmp_path, make, capsys):
    folder = make()
    for arguments, message in (
        ([folder, f"{folder}/../run"], r"reporting: \S+/\.\./run is the same folder as \S+/run; name each run once\n$"),
        ([folder, tmp_path / "none"], r"reporting: \S+/none does not exist; name the folder of a run"),
        ([tmp_path / "none"], r"none does not exist"),
        ([], r"the following arguments are required: RUN"),
    ):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert left.value.code == 2
        assert re.search(message, capsys.readouterr().err)
