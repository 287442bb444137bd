"""The folder of a sparse module that is no model of transformers."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from prune_callbacks import MaskSet
from prune_callbacks.deploy import save_compressed
from prune_callbacks.storage.model_folder import save_sparse_model


class Net(nn.Module):
    """A convolution, running statistics, a recurrent layer, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("turned", torch.randn(2, 3).T)

    def forward(self, images):
        rows = self.norm(self.first(images)).flatten(2).transpose(1, 2)
        return self.b(self.a(self.recurrent(rows)[0])) + self.turned.sum()


def pruned():
    net = Net()
    net(torch.randn(4, 3, 6, 6))  # the statistics are no longer the first ones
    masks = MaskSet({name: torch.rand(net.get_parameter(name).shape) < 0.5 for name in ("first.weight", "a.weight")})
    with torch.no_grad():
        for name in masks:
            net.get_parameter(name).mul_(masks[name])
    return net.eval(), masks


def test_a_module_comes_back_as_it_was(tmp_path):
    net, masks = pruned()
    save_sparse_model(net, masks, tmp_path)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["README.md", "model.safetensors"]
    again = Net().eval()
    images = torch.randn(2, 3, 6, 6)
    assert not torch.equal(again(images), net(images))
    assert load_model(again, tmp_path / "model/model.safetensors") == (set(), [])
    assert torch.equal(again(images), net(images))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    assert again.a.weight is again.b.weight
    kept = MaskSet.load(tmp_path / "masks.safetensors")
    assert kept == masks
    assert kept.violations(again.named_parameters()) == {}
    assert kept.violations(Net().named_parameters()) != {}


def test_tied_weights_are_kept_once(tmp_path):
    net, masks = pruned()
    save_sparse_model(net, masks, tmp_path)
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        assert set(net.state_dict()) - set(file.keys()) == {"b.weight"}
        assert file.metadata() == {"format": "pt", "b.weight": "a.weight"}
    net.b.weight = nn.Parameter(net.a.weight.clone())
    save_sparse_model(net, masks, tmp_path)
    assert set(load_file(tmp_path / "model/model.safetensors")) == set(net.state_dict())


def test_gathered_weights_are_written_in_place_of_the_modules(tmp_path):
    """Views of one memory, as of a recurrent layer on a GPU, are no tied weights."""
    net, masks = pruned()
    memory = torch.cat([value.flatten() for value in net.state_dict().values()])
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    parts = memory.split([shape.numel() for shape in shapes.values()])
    state = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    for parameter in net.parameters():
        parameter.data.zero_()
    save_sparse_model(net, masks, tmp_path, state_dict=state)
    written = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_the_card_says_how_it_is_loaded(tmp_path):
    net, masks = pruned()
    save_sparse_model(net, masks, tmp_path)
    card = " ".join((tmp_path / "model/README.md").read_text().split())
    assert "transformers" not in card
    assert f"{masks.sparsity():.2%} of the weights of 2 layers are zero" in card
    assert "no code: build the `Net` they belong to and load them by `safetensors.torch.load_model(module, " in card
    assert "tags: - sparse - pruned - prune-callbacks" in card


def test_what_could_not_be_loaded_is_refused(tmp_path):
    net = Net()
    spectral_norm(net.a)
    with pytest.raises(ValueError, match=r"could not be loaded from its files, because of layer a: .*parametriz"):
        save_sparse_model(net, MaskSet({}), tmp_path / "computed")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

    with pytest.raises(ValueError, match="Extra has values that are no tensors, first _extra_state, which no"):
        save_sparse_model(Extra(2, 2), MaskSet({}), tmp_path / "extra")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_the_older_one(tmp_path, monkeypatch):
    net, masks = pruned()
    save_sparse_model(net, masks, tmp_path)
    before = (tmp_path / "model/model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr("prune_callbacks.storage.model_folder.save_file", full)
    with pytest.raises(OSError, match="the disk is full"):
        save_sparse_model(Net(), masks, tmp_path)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


def test_what_needs_a_model_of_transformers_still_says_so(tmp_path):
    net, masks = pruned()
    with pytest.raises(ValueError, match="only transformers models can be saved, got Net"):
        save_compressed(net, masks, tmp_path)
