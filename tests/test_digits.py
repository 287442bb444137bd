"""The recipe on handwritten digits: a residual network pruned in rounds, beside one-shot pruning."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import hydra
import pytest
import torch
from fits import trainer_of
from launch import trained
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from prune_callbacks import Magnitude, MaskEnforcer, MaskSet, OneShotPrune, Unstructured
from prune_callbacks.tasks import DigitsDataModule, ImageClassifier, SmallResNet
from prune_callbacks.tasks.image_classifier import ResidualBlock

ROOT = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder, *words):
    """Runs train.py in this process; returns its report."""
    with hydra.initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
        load(ROOT / "train.py").run(["recipe=digits_imp_90", *words, f"output_dir={folder}", "~callbacks.progress"])
    return report_of(folder)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def quality(network, data):
    """The accuracy and the mean loss on the digits held out, of the whole set at once."""
    images, labels = data.test.tensors
    with torch.no_grad():
        logits = network.eval()(images)
    return {
        "val_accuracy": float((logits.argmax(1) == labels).double().mean()),
        "val_loss": float(cross_entropy(logits, labels)),
    }


def weights_of(state):
    """The weights of the network among those of the module."""
    return {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder, "smoke=true")
    return folder


def test_the_recipe_beside_one_shot(finished):
    imp, one_shot = report_of(finished), report_of(finished / "digits_oneshot_90")
    assert [entry["step"] for entry in imp["rounds"]] == [12 + 6 * r for r in range(11)]
    assert [e["sparsity"] for e in imp["rounds"]] == pytest.approx([1 - 0.1 ** (r / 10) for r in range(11)], abs=2e-5)
    assert [entry["step"] for entry in one_shot["rounds"]] == [36, 72]
    assert [entry["sparsity"] for entry in one_shot["rounds"]] == pytest.approx([0, 0.9], abs=2e-5)
    for report in (imp, one_shot):
        assert report["optimizer_steps"] == 72
        assert report["violations"] == {}
        assert report["sparsity"]["achieved"] == pytest.approx(0.9, abs=2e-5)
        assert len(report["sparsity"]["layers"]) == 9  # all convolutions and the linear layer
        assert report["skipped"] == {}
        assert {"val_accuracy", "val_loss"} == set(report["metrics"])
        for name, stages in report["metrics"].items():
            assert set(stages) == {"dense", "pruned", "recovered"}
            assert report["rounds"][0]["metrics"][name] == stages["dense"]
            assert report["rounds"][-1]["metrics"][name] == stages["recovered"]
    assert "2 runs side by side" in (finished / "compare.html").read_text()
    for picture in ("compared.png", "report.png", "sparsity.png"):
        assert (finished / picture).stat().st_size > 10_000


def test_the_saved_network_is_what_was_measured(finished):
    report, weights = report_of(finished), load_file(finished / "model/model.safetensors")
    assert MaskSet.load(finished / "masks.safetensors").violations(weights) == {}
    network = SmallResNet()
    data = DigitsDataModule()
    untrained = quality(network, data)
    network.load_state_dict(weights_of(weights))
    for name, value in quality(network, data).items():
        assert value == pytest.approx(report["metrics"][name]["recovered"], rel=1e-4)
        assert value != pytest.approx(untrained[name], rel=1e-4)


def test_every_round_begins_with_the_early_weights_and_statistics(finished):
    """What was measured after the last change is the network of step 6, under the last masks."""
    state = weights_of(torch.load(finished / "rewind_step_6.pt", weights_only=True)["state_dict"])
    masks = {name.removeprefix("network."): mask for name, mask in MaskSet.load(finished / "masks.safetensors").items()}
    measured = report_of(finished)["metrics"]["val_loss"]["pruned"]
    network, data = SmallResNet(), DigitsDataModule()
    network.load_state_dict(state)
    assert quality(network, data)["val_loss"] != pytest.approx(measured, rel=1e-6)  # control: without the masks
    for name, mask in masks.items():
        network.get_parameter(name).data *= mask
    assert quality(network, data)["val_loss"] == pytest.approx(measured, rel=1e-6)
    network.norm.reset_running_stats()  # control: with other statistics
    assert quality(network, data)["val_loss"] != pytest.approx(measured, rel=1e-6)


ROUNDS = ("schedule.rounds=2", "schedule.begin=16", "schedule.every=10", "trainer.max_steps=36")
SHORT = ("smoke=true", "beside=[]", *ROUNDS)


@pytest.mark.slow
def test_a_seed_decides_all_bits_and_a_resumed_run_ends_with_them(tmp_path):
    """The checkpoint is of step 30, in the middle of the second epoch and of the second round."""
    every = "callbacks.checkpoint.every_n_train_steps=30"
    whole = run(tmp_path / "whole", *SHORT, every)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "whole/rewind_step_6.pt", resumed)
    checkpoint = tmp_path / "whole/checkpoints/step_30.ckpt"
    again = run(resumed, *SHORT, every, f"ckpt_path={checkpoint}")
    assert again["rounds"] == whole["rounds"]
    assert {entry["step"] for entry in whole["rounds"]} == {16, 26, 36}
    for name in ("masks.safetensors", "model/model.safetensors"):
        assert (resumed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = run(tmp_path / "other", *SHORT, "seed=1")
    assert other["rounds"] != whole["rounds"]


@pytest.mark.slow
def test_control_without_rewinding_training_goes_on(tmp_path):
    before = run(tmp_path / "a", *SHORT)
    after = run(tmp_path / "b", *SHORT, "callbacks.iterative.rewind=null")
    assert not list((tmp_path / "b").glob("rewind*"))
    assert before["rounds"][0] == after["rounds"][0]
    assert before["metrics"]["val_loss"]["pruned"] != after["metrics"]["val_loss"]["pruned"]
    assert before["metrics"]["val_loss"]["recovered"] > after["metrics"]["val_loss"]["recovered"]  # trained for longer


def test_control_without_the_enforcer_there_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"IterativePrune.*MaskEnforcer"):
        run(tmp_path, *SHORT, "~callbacks.enforcer")


def test_zeros_of_convolutions_beside_normalization_hold_and_control_without_the_enforcer_they_come_back(tmp_path):
    for enforcer, held in (([MaskEnforcer()], True), ([], False)):
        module, prune = ImageClassifier(SmallResNet(width=4)), OneShotPrune(Magnitude(Unstructured(0.9)))
        trainer_of([prune, *enforcer], tmp_path, limit_val_batches=0).fit(module, datamodule=DigitsDataModule())
        masks = prune.report.masks
        assert len(masks) == 8  # not the linear layer, which makes the output
        assert not any("classify" in name for name in masks)
        assert masks.sparsity() == pytest.approx(0.9, abs=0.01)
        back = sum(masks.violations(module.named_parameters()).values())
        assert (back == 0) if held else (back > 0.5 * sum(int((~masks[name]).sum()) for name in masks))


def means(folders, tmp_path, monkeypatch, capsys):
    """Runs the benchmark on folders of runs; returns the means that it writes and what it prints."""
    bench = load(ROOT / "benchmarks/digits.py")
    results, picture = tmp_path / "r.json", tmp_path / "p.png"
    words = ["digits.py", *map(str, folders), "--results", str(results), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    assert picture.stat().st_size > 10_000
    return json.loads(results.read_text())["means"], capsys.readouterr().out


def check_bar(found, near):
    """Iterative pruning loses at most `near` of the accuracy, and one-shot pruning without recovery far more."""
    assert found["iterative"] >= found["dense"] - near
    assert found["one-shot, pruned"] < found["dense"] - 0.3


@pytest.mark.slow
def test_ninety_percent_cost_little_in_rounds_and_much_at_once(tmp_path, monkeypatch, capsys):
    """One seed, a ninth of the recipe's steps."""
    words = ["schedule.rounds=2", "schedule.begin=60", "schedule.every=50", "module.scheduler_steps=60"]
    run(tmp_path / "run", *words, "callbacks.iterative.rewind.step=10", "trainer.max_steps=160")
    found, _ = means([tmp_path / "run"], tmp_path, monkeypatch, capsys)
    assert found["dense"] > 0.95
    check_bar(found, near=0.05)


@pytest.mark.slow
def test_the_mean_of_three_seeds_is_within_a_point_of_the_dense_accuracy(tmp_path, monkeypatch, capsys):
    trained(
        "--multirun", "recipe=digits_imp_90", "seed=0,1,2", f"output_dir={tmp_path}/runs/seed_${{seed}}",
        f"hydra.sweep.dir={tmp_path}", timeout=1500,
    )  # fmt: skip
    found, printed = means(sorted((tmp_path / "runs").iterdir()), tmp_path, monkeypatch, capsys)
    assert printed.count("\n") == 6
    assert found["dense"] > 0.98
    check_bar(found, near=0.01)
    check_bar(json.loads((ROOT / "benchmarks/results/digits_imp_90.json").read_text())["means"], near=0.01)


def test_the_benchmark_takes_finished_runs_of_several_seeds(finished, tmp_path, monkeypatch, capsys):
    second = shutil.copytree(finished, tmp_path / "second")
    with pytest.raises(ValueError, match=r"second has seed 0, as another of the runs has"):
        means([finished, second], tmp_path, monkeypatch, capsys)
    (second / "config.yaml").write_text((second / "config.yaml").read_text().replace("\nseed: 0\n", "\nseed: 4\n"))
    report = report_of(second)
    report["metrics"]["val_accuracy"]["recovered"] = 1.0
    (second / "report.json").write_text(json.dumps(report))
    found, printed = means([finished, second], tmp_path, monkeypatch, capsys)
    measured = report_of(finished)["metrics"]["val_accuracy"]
    assert found["dense"] == pytest.approx(measured["dense"], abs=1e-4)
    assert found["iterative"] == pytest.approx((measured["recovered"] + 1) / 2, abs=1e-4)
    pruned = report_of(finished / "digits_oneshot_90")["metrics"]["val_accuracy"]["pruned"]
    assert found["one-shot, pruned"] == pytest.approx(pruned, abs=1e-4)
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:]] == ["| 0", "| 4", "| mean"]
    report["stage"] = "pruned"
    (second / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"second is not a finished run of a digits recipe"):
        means([finished, second], tmp_path, monkeypatch, capsys)


# The data and the network


def test_a_quarter_of_every_digit_is_held_out_and_it_is_the_same_for_every_seed():
    data, other_seed, other_split = DigitsDataModule(), DigitsDataModule(seed=1), DigitsDataModule(split_seed=1)
    images, labels = data.train.tensors
    held_out, held_out_labels = data.test.tensors
    assert (len(images), len(held_out)) == (1347, 450)
    assert images.shape[1:] == (1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    everything = torch.cat([labels, held_out_labels]).bincount()
    assert everything.sum() == 1797
    assert (held_out_labels.bincount() - everything / 4).abs().max() < 1
    assert torch.equal(other_seed.test.tensors[0], held_out)
    assert not torch.equal(other_split.test.tensors[0], held_out)
    both = torch.cat([images, held_out]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)  # no image is in both
    first = [next(iter(module.train_dataloader()))[1] for module in (data, DigitsDataModule(), other_seed)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert torch.cat([batch[1] for batch in data.val_dataloader()]).equal(held_out_labels)
    assert torch.cat([batch[1] for batch in data.test_dataloader()]).equal(held_out_labels)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"those of scikit-learn: pip install prune-callbacks\[digits\]"):
        DigitsDataModule()


def test_the_network_has_skip_connections_and_normalization():
    block, x = ResidualBlock(4, 4), torch.randn(3, 4, 8, 8)
    before = block.eval()(x)
    torch.nn.init.zeros_(block.second.weight)
    assert torch.equal(block(x), x.relu())  # what the convolutions add is gone, what skips them is not
    assert not torch.equal(before, x.relu())
    wider = ResidualBlock(4, 6, stride=2).eval()
    assert wider(x).shape == (3, 6, 4, 4)
    network = SmallResNet(width=4, channels=3, classes=5)
    assert network(torch.randn(2, 3, 12, 12)).shape == (2, 5)
    assert sum(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules()) == 7
    network = SmallResNet()
    assert sum(p.numel() for p in network.parameters() if p.ndim > 1) == 37_840


def test_the_default_optimizer_is_adamw_without_a_scheduler():
    module = ImageClassifier(SmallResNet(width=2))
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 1e-3
    assert len(optimizer.param_groups[0]["params"]) == len(list(module.network.parameters()))
