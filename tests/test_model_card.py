"""The README of every folder that a sparse model is written into: what a person who finds it reads."""

import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from prune_callbacks import NM, Magnitude, consolidate, prune_checkpoint, prune_sequentially
from prune_callbacks.storage.model_card import write_model_card
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import tiny_llama

DENSE = """---
license: apache-2.0
tags:
- mine
---

# A dense model

It speaks.
"""


@pytest.fixture
def pruned():
    model = tiny_llama(hidden_size=32, layers=2)
    return model, prune_sequentially(model, None, Magnitude(NM(2, 4)), progress=False).masks


def text(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_saved_model_says_what_it_is(tmp_path, pruned, monkeypatch):
    model, masks = pruned
    model.config._name_or_path = "someone/dense"
    monkeypatch.setattr("prune_callbacks.storage.model_card.try_to_load_from_cache", lambda *_: "a file of the cache")
    for _ in range(2):  # written again, nothing is there twice
        save_sparse_model(model, masks, tmp_path)
    card = ModelCard.load(tmp_path / "model/README.md")
    assert card.data.base_model == "someone/dense"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["sparse", "pruned", "prune-callbacks"]
    assert text(tmp_path / "model").count("50.00% of the weights of 14 layers are zero") == 1


def test_no_path_of_a_machine_is_in_it(tmp_path, pruned):
    model, masks = pruned
    for name in (str(tmp_path), "some/folder"):
        model.config._name_or_path = name
        save_sparse_model(model, masks, tmp_path)
        assert str(tmp_path) not in text(tmp_path / "model")
        assert "some/folder" not in text(tmp_path / "model")  # it is in no cache of the hub


def test_the_dense_models_card_is_kept_below(tmp_path, pruned):
    (tmp_path / "README.md").write_text(DENSE)
    for sparsity in (0.5, 0.75):
        write_model_card(tmp_path, sparsity, 14)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["mine", "sparse", "pruned", "prune-callbacks"]
    assert "75.00% of the weights" in card.text
    assert "50.00%" not in card.text
    assert card.text.index("75.00%") < card.text.index("# A dense model") < card.text.index("It speaks.")


def test_streamed_and_consolidated_folders_have_one(tmp_path, pruned):
    model, masks = pruned
    tiny_llama(hidden_size=32, layers=2).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense/README.md").write_text(DENSE)
    prune_checkpoint(tmp_path / "dense", tmp_path / "streamed", Magnitude(NM(2, 4)), progress=False)
    streamed = text(tmp_path / "streamed/model")
    assert "50.00% of the weights of 14 layers are zero" in streamed
    assert "It speaks." in streamed
    save_sparse_model(model, masks, tmp_path / "saved")
    callbacks = {"MaskEnforcer": {"masks": masks.state_dict()}}
    torch.save({"state_dict": model.state_dict(), "global_step": 7, "callbacks": callbacks}, tmp_path / "a.ckpt")
    shutil.copy(tmp_path / "dense/README.md", tmp_path / "saved/model/README.md")
    consolidate(tmp_path / "a.ckpt", tmp_path / "saved/model", tmp_path / "consolidated", progress=False)
    consolidated = text(tmp_path / "consolidated/model")
    assert "Consolidated from a checkpoint of optimizer step 7." in consolidated
    assert "It speaks." in consolidated


@pytest.mark.parametrize(
    "written",
    [
        b"---\nlicense: mit: x\n---\nIt speaks.\n",
        b"---\n- a list\n---\nIt speaks.\n",
        b"---\n{{ license }}\n---\nIt speaks.\n",
        "It speaks. Gru\xdf\n".encode("latin-1"),
        b"---\r\nlicense: mit\r\n---\r\nIt speaks.\r\n",
        b"",
    ],
)
@pytest.mark.filterwarnings("ignore:the metadata of the model")
def test_odd_cards_cost_no_run(tmp_path, written):
    (tmp_path / "README.md").write_bytes(written)
    write_model_card(tmp_path, 0.5, 14)
    found = text(tmp_path)
    assert "50.00% of the weights" in found
    assert "It speaks." in found or not written
    assert ModelCard(found).data.tags == ["sparse", "pruned", "prune-callbacks"]
