"""Modules that are built from a path when a fit begins: under every strategy what one built in __init__ is."""

import json
from pathlib import Path

import families
import pytest
import torch
from launch import together
from safetensors import safe_open
from tiers import slow
from transformers import AutoModelForCausalLM

from prune_callbacks import CausalLM, LogitsDistillation, MaskSet, SquareHead
from prune_callbacks.sparsity import keep_largest
from prune_callbacks.tasks import tiny_llama

SCRIPT = Path(__file__).parent / "path_ranks.py"


def mixtral():
    torch.manual_seed(0)
    config = families.MIXTURES["mixtral"]()
    config.vocab_size = 256
    return AutoModelForCausalLM.from_config(config)


MODELS = {"tied llama": lambda: tiny_llama(hidden_size=32, layers=2), "mixture": mixtral}


def folder_of(tmp_path, kind):
    """Writes a model in several files, half of whose weights are zero, and the masks."""
    model = MODELS[kind]()
    weights = {name: p for name, p in model.named_parameters() if "_proj" in name}
    keep = {n: keep_largest(p.detach().abs().flatten(), p.numel() // 2).view(p.shape) for n, p in weights.items()}
    masks = MaskSet(keep)
    masks.apply_(model.named_parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    masks.save(tmp_path / "masks.safetensors")
    return tmp_path


def results(folder, name, way):
    return [torch.load(folder / f"{name}_{way}_{rank}.pt") for rank in range(2)]


def weight_bytes(folder, name="model"):
    total = 0
    for path in (folder / name).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (not a dict)
    return total


@pytest.mark.parametrize(
    ("kind", "name", "precision"),
    [
        ("tied llama", "fsdp2", "32-true"),
        ("tied llama", "zero3", "32-true"),
        slow("tied llama", "zero3", "bf16-mixed"),
        slow("tied llama", "fsdp2", "bf16-mixed"),
        slow("mixture", "fsdp2", "32-true"),
        slow("mixture", "zero3", "32-true"),
        slow("tied llama", "ddp", "32-true"),
        slow("tied llama", "zero1", "32-true"),
        slow("tied llama", "zero2", "32-true"),
    ],
)
def test_a_fit_from_a_path_is_the_fit_of_a_model_built_in_init(tmp_path, kind, name, precision):
    folder = folder_of(tmp_path, kind)
    together(SCRIPT, "fit", folder, name, precision)
    for built, by_path in zip(*(results(folder, name, way) for way in ("init", "path")), strict=True):
        assert by_path["losses"] == built["losses"]
        assert by_path["weights"].keys() == built["weights"].keys()
        assert all(torch.equal(value, by_path["weights"][key]) for key, value in built["weights"].items())
        assert all(torch.equal(value, by_path["buffers"][key]) for key, value in built["buffers"].items())
        assert len(by_path["worst"]) == 4
        assert not any(value for row in by_path["worst"] for value in row.values())
    assert len(set(built["losses"])) > 3
    if name in ("fsdp2", "zero3"):
        read, total = [part["read"] for part in results(folder, name, "path")], weight_bytes(folder)
        # Rows that two ranks share are read by both, and experts, which are made of several tensors, whole.
        assert total <= sum(read) <= (2.01 if kind == "mixture" else 1.1) * total
        assert max(read) <= (1.01 if kind == "mixture" else 0.6) * total


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("zero3", "logits"),
        slow("zero3", "squarehead"),
        slow("fsdp2", "logits"),
        ("fsdp2", "squarehead"),
        slow("ddp", "logits"),
        slow("zero2", "squarehead"),
    ],
)
def test_a_teacher_from_a_path_is_in_parts_under_every_strategy(tmp_path, name, objective):
    folder = folder_of(tmp_path, "tied llama")
    together(SCRIPT, "distilled", folder, name, objective)
    for whole, parts in zip(*(results(folder, f"{name}_{objective}", way) for way in ("whole", "path")), strict=True):
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert parts["held"] <= 0.55 * whole["held"]  # control: the other is whole
        assert parts["read"] <= 0.6 * weight_bytes(folder)
    assert results(folder, f"{name}_{objective}", "path")[1]["losses"][1] == 0  # where nothing was predicted


def test_a_teacher_that_does_not_fit_is_refused_before_it_is_read(tmp_path):
    folder = folder_of(tmp_path, "tied llama")
    tiny_llama(hidden_size=64, layers=2).save_pretrained(tmp_path / "wide")
    module = CausalLM(path=folder / "model", objective=SquareHead(tmp_path / "wide"))
    module.setup("fit")
    with pytest.raises(ValueError, match="the teacher has hidden_size=64 and the model 32: they cannot be compared"):
        module._take(module._source.whole())
    with pytest.raises(ValueError, match="nothing does not exist; name a folder with config.json"):
        LogitsDistillation(tmp_path / "nothing").prepare(tiny_llama(hidden_size=32, layers=2))
    with pytest.raises(ValueError, match="a teacher is a model of transformers, or the path of one, got 3"):
        LogitsDistillation(3)


def test_bad_paths_are_refused_before_work(tmp_path):
    model = tiny_llama(hidden_size=32, layers=2)
    for given in ({}, {"model": model, "path": tmp_path}):
        with pytest.raises(ValueError, match=f"a model or the path of one, got {'both' if given else 'neither'}"):
            CausalLM(**given)
    with pytest.raises(ValueError, match="nothing does not exist; name a folder with config.json"):
        CausalLM(path=tmp_path / "nothing").setup("fit")
    model.save_pretrained(tmp_path / "pickled")
    weights = tmp_path / "pickled/model.safetensors"
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"it has pytorch_model.bin. Pickles can run code and are never loaded"):
        CausalLM(path=tmp_path / "pickled").setup("fit")
    model.save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    next((tmp_path / "cut").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="is missing, and model.safetensors.index.json says that it has tensors"):
        CausalLM(path=tmp_path / "cut").setup("fit")
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) > 10


def test_a_path_on_one_device_is_from_pretrained(tmp_path):
    from fits import trainer_of
    from rank_fits import batches

    folder = folder_of(tmp_path, "tied llama")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "model")
    module = CausalLM(path=folder / "model", objective=LogitsDistillation(teacher))
    trainer = trainer_of([], tmp_path, max_steps=1)
    trainer.fit(module, datamodule=batches())
    assert type(module.model) is type(teacher)
    assert module.model.training
    assert torch.isfinite(trainer.callback_metrics["train_loss_logits"])
