"""The page about a run, from folders made by hand, and what a browser says about it."""

import base64
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import KINDS, NAMES, RECORD, html, make_run, masks_of_a_run, perplexity, words

from prune_callbacks import MaskSet
from prune_callbacks.reporting.comparison import write_comparison
from prune_callbacks.reporting.drawing import draw_corner, layer_grid
from prune_callbacks.reporting.page import mask_pictures, render, share_recovered, verdict, write_page
from prune_callbacks.storage.run_record import RunRecord

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture
def make(tmp_path):
    return lambda name="run", **changes: make_run(tmp_path / name, **changes)


def test_a_finished_run_is_told_whole(make):
    page = html(make())
    text = words(page)
    for expected in (
        "dense 5.00 before pruning pruned 7.00 right after pruning recovered 5.50 after training with masks held",
        "on WikiText-2, in windows of 2048 tokens",
        "50.00 % of the weights of 9 layers are zero. Training after pruning took back 75 % of what pruning cost",
        "Every pruned weight is exactly zero",
        "python train.py recipe=sparsegpt_50 'data.path=my corpus'",
        "SparseGPT(pattern=NM(n=2, m=4))",
        "OWL(threshold=5.0)",
        "C4 validation 1024 256 7.25 9.12 -",
        "piqa acc 1838 81.25 % ± 1.00 % - 75.25 %",
        "model.layers.0.mlp.gate its 6 inputs are no multiple of 4",
        "damping 0.01 was too small",
        "pruning 75.2 s - perplexity",
        "training 67 min - perplexity",
        "measuring quality 5 min Peak memory: 3.00 GiB.",
        "seed: 0",
    ):
        assert expected in text
    assert "not complete" not in text
    assert page.count('class="mask"') == 3
    alts = re.findall(r'<img [^>]*?alt="([^"]+)"', page)
    assert len(alts) == page.count("<img") == 6
    assert any("reconstruction loss" in alt for alt in alts)
    assert any("Training loss" in alt for alt in alts)


def test_experts_that_were_left_to_magnitude_are_named(make):
    assert "Magnitude" not in words(html(make()))
    text = words(html(make("few", by_magnitude={"model.layers.0.mlp.experts.down_proj.7": 31})))
    assert "Experts pruned by Magnitude" in text
    assert "expert tokens model.layers.0.mlp.experts.down_proj.7 31" in text


def test_how_windows_were_made_is_told_in_one_line(make):
    assert "windows of text" not in words(html(make()))
    text = words(html(make("told", text={"bos": True, "calibration_rows": "joined"})))
    assert "windows of text bos: yes, calibration rows: joined" in text


def test_the_page_refers_to_nothing_outside(make):
    page = html(make()) + render("compare.html", title="none", groups=[])
    references = re.findall(r'(?:src|href|action|data|srcset)\s*=\s*"([^"]*)"', page)
    assert len(references) > 6
    assert all(reference.startswith("data:") for reference in references)
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<script|<link rel=\"(?!icon)", re.sub(r"base64,[^\"]*", "", page)
    )


def test_masks_that_did_not_hold_are_flagged(make):
    text = words(html(make(violations={NAMES[1]: 12, NAMES[2]: 30})))
    assert "42 pruned weights are not zero." in text
    assert f"{NAMES[2]} : 30" in text
    assert "exactly zero" not in text


@pytest.mark.parametrize(
    ("measured", "share", "sentence"),
    [
        ({"recovered": 5.0}, 1.0, "took back 100 % of"),
        ({"recovered": 4.0}, 1.5, "took back all of what pruning cost, and more"),
        ({"recovered": 8.0}, -0.5, "made perplexity worse than pruning left it"),
        ({"pruned": 5.01}, None, "At the end perplexity is 10.0 % higher than before pruning."),
        ({"pruned": None}, None, "10.0 % higher"),
        ({"recovered": None}, None, None),
    ],
)
def test_what_came_back_is_said_where_it_makes_sense(measured, share, sentence):
    record = RunRecord.from_json(RECORD | perplexity(**measured))
    assert share_recovered(record) == share
    said = " ".join(verdict(record))
    assert sentence in said if sentence else "perplexity" not in said


def test_of_masks_that_change_during_training_no_share_is_told(make):
    rounds = [
        {"step": step, "sparsity": zeros, "perplexity": 5 + zeros} for step, zeros in ((4, 0.0), (9, 0.25), (20, 0.5))
    ]
    text = words(html(make(schedule="IMPSchedule(0.5)", rounds=rounds, changes=[4, 9], reconstruction_loss={})))
    assert "took back" not in text
    assert "the masks changed (2 times, first after step 4, last after step 9)" in text
    assert "0 4 0.00 % 5.00 1 9 25.00 % 5.25 2 20 50.00 % 5.50" in text
    assert "pruned 7.00 right after the masks' last change" in text
    assert "No reconstruction loss was measured." in text


def test_a_run_in_training_says_what_is_missing_and_how_to_go_on(make):
    folder = make(stage="pruned", training_loss=[], **perplexity(recovered=None))
    text = words(html(folder))
    assert "This run is not complete." in text
    assert "The recovered model's perplexity: training has not come to its end." in text
    assert "start it again in another folder: python train.py recipe=sparsegpt_50 'data.path=my corpus'" in text
    assert "recovered not measured after training" in text
    assert "No training step has been recorded." in text
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/step_500.ckpt").touch()
    text = words(html(folder))
    assert f"output_dir={folder} ckpt_path={folder}/checkpoints/step_500.ckpt" in text
    assert "anew" not in text


def test_a_run_before_its_last_change_of_masks(make):
    page = html(make(stage="dense", schedule="IMPSchedule(0.9)", **perplexity(pruned=None, recovered=None)))
    assert "The pruned model's perplexity: the masks' last change is still to come." in words(page)


def test_a_folder_with_settings_only(make):
    folder = make()
    for name in ("report.json", "masks.safetensors", "model/config.json"):
        (folder / name).unlink()
    (folder / "model").rmdir()
    text = words(html(folder))
    assert "All measurements: report.json is first written when the model is pruned, and there is none yet." in text
    assert "The masks: there is no masks.safetensors." in text
    assert "The sparse model: there is no folder model/." in text
    assert "python train.py recipe=sparsegpt_50, with the overrides of the first start" in text
    assert "There are no masks to show." in text
    assert "dense not measured before pruning" in text
    assert "exactly zero" not in text
    (folder / "config.yaml").write_text("name: sensitivity\njob:\n  _target_: some.function\n")
    assert "this recipe calls a function in place of a training" in words(html(folder))


def test_damaged_masks_are_said_to_be(make):
    folder = make()
    (folder / "masks.safetensors").write_bytes(b"no masks")
    assert "masks.safetensors is not a readable safetensors file" in words(html(folder))


def test_reports_that_lack_entries_are_rendered(make):
    new = ("command", "corpora", "zero_shot", "allocation", "warnings", "rounds", "changes", "schedule", "adapter")
    old = {key: value for key, value in RECORD.items() if key not in (*new, "strategy", "processes", "stage")}
    folder = make()
    (folder / "report.json").write_text(json.dumps(old))
    text = words(html(folder))
    assert "not complete" not in text
    assert "took back 75 %" in text
    assert "The command that repeats it is not known" in text
    assert "This run's report does not hold its warnings." in text


def test_what_is_no_run_is_refused(tmp_path, make):
    with pytest.raises(ValueError, match=r"nowhere does not exist; name the folder of a run"):
        write_page(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(
        ValueError, match=r"other holds no run: found nothing. A run's folder holds at least one of rep"
    ):
        write_page(tmp_path / "other")
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds no run: found notes.txt\. A"):
        write_page(tmp_path / "other")
    with pytest.raises(ValueError, match=r"notes.txt is a file; name the folder"):
        write_page(tmp_path / "other/notes.txt")
    folder = make()
    (folder / "report.json").write_text('{"setting": {}}')
    with pytest.raises(ValueError, match="is not the report of a run, which RunReport writes: it has no perplexity"):
        write_page(folder)
    (folder / "report.json").write_text('{"perp')
    with pytest.raises(ValueError, match=r"report.json is damaged: .*Delete it"):
        write_page(folder)
    assert not (folder / "report.html").exists()


def test_hostile_names_stay_text(make):
    evil = '<script>alert("1")</script>'
    layers = {f"model.layers.0.{evil}.weight": 0.5, "model.layers.0.$x$y$\\frac.weight": 0.5}
    folder = make(
        "evil",
        model=evil,
        warnings=[evil],
        skipped={evil: evil},
        by_magnitude={evil: 3},
        sparsity={"target": 0.5, "achieved": 0.5, "layers": layers},
        reconstruction_loss=dict.fromkeys(layers, 0.1),
        pruner="$\\frac{",
        **perplexity(dataset=evil),
    )
    (folder / "config.yaml").write_text(f"name: {evil}")
    write_comparison([folder, make(model=evil)], folder / "compare.html")
    for page in (html(folder), (folder / "compare.html").read_text(encoding="utf-8")):
        assert "<script" not in page
        assert "&lt;script&gt;alert(" in page


def test_the_grid_has_every_value_in_its_place():
    values = {f"model.layers.{b}.{k}.weight": 10.0 * b + i for b in (0, 2, 11) for i, k in enumerate(KINDS)}
    del values["model.layers.2.self_attn.o_proj.weight"]
    blocks, kinds, grid = layer_grid(dict(reversed(values.items())))
    assert blocks == ["0", "2", "11"]  # by number
    assert kinds == ["down_proj", "o_proj", "q_proj"]
    np.testing.assert_array_equal(grid, [[2, 1, 0], [22, np.nan, 20], [112, 111, 110]])


def test_blocks_of_several_lists_keep_apart():
    layers = [f"net.layer{stage}.{block}.conv{n}.weight" for stage in (1, 2) for block in (0, 1) for n in (1, 2)]
    values = {name: float(place) for place, name in enumerate([*layers, "net.fc.weight"])}
    blocks, kinds, grid = layer_grid(values)
    assert blocks == ["-", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert kinds == ["conv1", "conv2", "fc"]
    np.testing.assert_array_equal(grid[1:, :2], [[0, 1], [2, 3], [4, 5], [6, 7]])
    assert grid[0, 2] == 8


def test_kinds_of_one_name_and_experts_keep_apart_or_together():
    blocks, kinds, grid = layer_grid(
        {
            "transformer.h.4.attn.c_proj.weight": 1.0,
            "transformer.h.4.mlp.c_proj.weight": 2.0,
            "transformer.h.4.mlp.experts.0.up.weight": 3.0,
            "transformer.h.4.mlp.experts.1.up.weight": 5.0,
            "head.weight": 7.0,
        }
    )
    assert blocks == ["-", "4"]
    assert kinds == ["attn.c_proj", "mlp.c_proj", "up", "head"]
    np.testing.assert_array_equal(grid, [[np.nan, np.nan, np.nan, 7], [1, 2, 4, np.nan]])


def test_a_pixel_of_a_mask_is_a_weight(tmp_path):
    masks = masks_of_a_run()
    for picture in mask_pictures(masks):
        assert picture["shown"] == [64, 128]
        kept = pixels(picture["picture"], tmp_path)
        np.testing.assert_array_equal(kept, masks[picture["name"]][:64, :128].numpy())
        assert picture["sparsity"] == pytest.approx(masks.layer_sparsity()[picture["name"]])
    chosen = [picture["name"] for picture in mask_pictures(masks)]
    assert chosen == [NAMES[0], NAMES[4], NAMES[8]]  # three blocks, three kinds
    assert mask_pictures(MaskSet({})) == []
    small = np.array([[True, False, False]])
    np.testing.assert_array_equal(pixels(draw_corner(small), tmp_path), small)


def pixels(uri, tmp_path):
    """Whether each is black; there are no other colours than black and white."""
    (tmp_path / "mask.png").write_bytes(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    colours = np.asarray(Image.open(tmp_path / "mask.png").convert("RGB"))
    assert set(np.unique(colours)) <= {0, 255}
    return (colours == 0).all(-1)


def chromium(page, tmp_path):
    """What the page says on the console."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --window-size=1200,3000"
    where = [f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/shot.png", f"file://{page}"]
    done = subprocess.run([CHROMIUM, *flags.split(), *where], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM}")
def test_a_browser_shows_the_pages_without_a_complaint(tmp_path, make):
    write_page(make())
    assert chromium(tmp_path / "run/report.html", tmp_path) == []
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert shot.shape[:2] == (3000, 1200)
    coloured = (shot.max(-1) - shot.min(-1) > 100).mean()
    assert coloured > 0.005  # heat maps are there
    write_comparison([tmp_path / "run", make("two", model="other")], tmp_path / "compare.html")
    assert chromium(tmp_path / "compare.html", tmp_path) == []
    spoilt = (
        (tmp_path / "compare.html").read_text(encoding="utf-8").replace("<main", "<script>hello()</script><main", 1)
    )
    (tmp_path / "spoilt.html").write_text(spoilt, encoding="utf-8")
    assert "Content Security Policy" in chromium(tmp_path / "spoilt.html", tmp_path)[0]  # errors would be seen
