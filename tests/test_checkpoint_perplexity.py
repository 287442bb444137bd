"""The perplexity of a checkpoint that is read block by block: that of the whole model."""

import pytest
import torch
from families import FAMILIES, MIXTURES
from launch import together
from test_path import MODELS, SCRIPT
from tiers import slow
from transformers import AutoModelForCausalLM

from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.streaming import checkpoint_perplexity
from prune_callbacks.streaming.front import Front
from prune_callbacks.streaming.inputs import StoredInputs

QUICK = ("llama", "gemma2", "gpt2", "opt", "mixtral", "falcon-40b")


def windows(count=5, tokens=12):
    return torch.randint(3, 60, (count, tokens), generator=torch.Generator().manual_seed(1))


def written(folder, family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((FAMILIES | MIXTURES)[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="10KB")
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", [name if name in QUICK else slow(name) for name in (*FAMILIES, *MIXTURES)])
def test_it_is_that_of_the_whole_model(tmp_path, family):
    wanted = perplexity(written(tmp_path / "model", family), windows(), batch_size=2, progress=False)
    found = checkpoint_perplexity(tmp_path / "model", windows(), tmp_path / "work", batch_size=2, progress=False)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert not list((tmp_path / "work").iterdir())


def test_control_the_last_hidden_states_decide(tmp_path, monkeypatch):
    wanted = perplexity(written(tmp_path / "model", "llama"), windows(), progress=False)
    hidden = StoredInputs.hidden.fget
    monkeypatch.setattr(StoredInputs, "hidden", property(lambda self: hidden(self) * 1.5))
    found = checkpoint_perplexity(tmp_path / "model", windows(), tmp_path / "work", progress=False)
    assert abs(found - wanted) > 1e-3 * wanted


def test_tied_weights_stay_tied_where_all_embeddings_were_loaded(tmp_path, monkeypatch):
    """As for a model that looks up tokens of its own; the output layer is filled afterwards."""
    MODELS["tied llama"]().save_pretrained(tmp_path / "model")
    wanted = perplexity(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), windows(), progress=False)
    monkeypatch.setattr(Front, "_is_embedding", lambda self, name: False)
    found = checkpoint_perplexity(tmp_path / "model", windows(), tmp_path / "work", progress=False)
    assert found == pytest.approx(wanted, rel=1e-6)


def test_two_ranks_share_the_windows(tmp_path):
    wanted = perplexity(written(tmp_path / "model", "llama"), windows(), batch_size=2, progress=False)
    torch.save(windows(), tmp_path / "windows.pt")
    together(SCRIPT, "measured", tmp_path)
    for rank in range(2):
        for count in (5, 1):  # one batch leaves the second rank without any
            found = torch.load(tmp_path / f"measured_{count}_{rank}.pt")["perplexity"]
            if count == 5:
                assert found == pytest.approx(wanted, rel=1e-6)
    assert torch.load(tmp_path / "measured_1_0.pt") == torch.load(tmp_path / "measured_1_1.pt")


def test_bad_input_is_refused_and_leaves_nothing(tmp_path):
    written(tmp_path / "model", "llama")
    with pytest.raises(ValueError, match="perplexity needs windows of two or more tokens, got \\(5, 1\\)"):
        checkpoint_perplexity(tmp_path / "model", windows(5, 1), tmp_path / "work")
    with pytest.raises(ValueError, match="nothing does not exist"):
        checkpoint_perplexity(tmp_path / "nothing", windows(), tmp_path / "work")
    with pytest.raises(ValueError, match="device='gpu' is unknown to torch"):
        checkpoint_perplexity(tmp_path / "model", windows(), tmp_path / "work", device="gpu")
    with pytest.raises(ValueError, match="model is the source, which is never changed"):
        checkpoint_perplexity(tmp_path / "model", windows(), tmp_path / "model")
    assert not (tmp_path / "work").exists()


def test_what_else_is_in_the_folder_stays(tmp_path):
    written(tmp_path / "model", "llama")
    (tmp_path / "kept.txt").write_text("mine")
    checkpoint_perplexity(tmp_path / "model", windows(), tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.txt", "model"]
