"""Who may read what is written: whoever may read other new files of the process."""

import os
import stat

import pytest
import torch

from prune_callbacks import NM, Magnitude, MaskSet, Unstructured, consolidate, prune_sequentially, save_compressed
from prune_callbacks.deploy import convert_to_csr_, save_csr
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import tiny_llama


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mode(request):
    """The permissions of new files under an umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder):
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}


def test_models_masks_and_packed_files_have_the_mode_of_new_files(tmp_path, mode, tokenizer):
    model = tiny_llama(hidden_size=32, layers=2)
    masks = prune_sequentially(model, None, Magnitude(NM(2, 4)), progress=False).masks
    save_sparse_model(model, masks, tmp_path / "sparse", tokenizer)
    save_compressed(model, masks, tmp_path / "packed", pattern=NM(2, 4))
    callbacks = {"MaskEnforcer": {"masks": masks.state_dict()}}
    state = {"state_dict": model.state_dict(), "global_step": 1, "callbacks": callbacks}
    torch.save(state, tmp_path / "plain.ckpt")
    consolidate(tmp_path / "plain.ckpt", tmp_path / "sparse/model", tmp_path / "consolidated", progress=False)
    written = modes(tmp_path)
    assert {"model.safetensors", "masks.safetensors", "compressed.safetensors", "config.json"} <= written.keys()
    assert set(written.values()) == {mode}


def test_csr_files_have_the_mode_of_new_files(tmp_path, mode):
    model = tiny_llama(hidden_size=32, layers=2)
    prune_sequentially(model, None, Magnitude(Unstructured(0.9)), progress=False)
    convert_to_csr_(model)
    save_csr(model, tmp_path / "csr.safetensors")
    assert modes(tmp_path) == {"csr.safetensors": mode}


def test_a_file_that_is_written_again_keeps_no_narrower_mode(tmp_path, mode):
    for _ in range(2):
        MaskSet({"weight": torch.ones(3, 4, dtype=torch.bool)}).save(tmp_path / "masks")
        assert modes(tmp_path) == {"masks": mode}
