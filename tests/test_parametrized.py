"""Weights that are no plain parameters in memory of their own: computed, packed, shared, lazy, frozen, empty."""

import warnings

import pytest
import torch
from fits import optimizer, trainer_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from prune_callbacks import (
    NM,
    CausalLM,
    Columns,
    ConstantSchedule,
    IterativePrune,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    QuantizeWeights,
    SparseGPT,
    Structured,
    Unstructured,
    permute_channels_,
    prune_sequentially,
    save_compressed,
)
from prune_callbacks.deploy.csr import convert_to_csr_
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import tiny_llama

NAME = "model.layers.1.mlp.down_proj"
HALF = Magnitude(Unstructured(0.5))
BATCHES = torch.randint(0, 259, (3, 2, 32), generator=torch.Generator().manual_seed(1)).unbind()

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens for the", "ignore:CSR takes")


def model_with(change, layer=NAME):
    model = tiny_llama(hidden_size=16, layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch calls its older tools deprecated
        change(model.get_submodule(layer))
    return model


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


class Product(nn.Linear):
    @property
    def weight(self):
        return self.left @ self.right


def low_rank(layer):
    weight = layer._parameters.pop("weight").detach()
    layer.__class__ = Product
    layer.left, layer.right = nn.Parameter(weight[:, :4].clone()), nn.Parameter(torch.ones(4, weight.shape[1]))


def untracked(layer):
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = weight


def buffered(layer):
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", weight)


REMOVE = 'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'
COMPUTED = {
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        'torch.nn.utils.prune.remove(layer, "weight")',
    ),
    "weight_norm": (parametrizations.weight_norm, REMOVE),
    "spectral_norm": (parametrizations.spectral_norm, REMOVE),
    "orthogonal": (parametrizations.orthogonal, REMOVE),
    "own": (lambda layer: parametrize.register_parametrization(layer, "weight", Halved()), REMOVE),
    "old_weight_norm": (nn.utils.weight_norm, 'torch.nn.utils.remove_weight_norm(layer, "weight")'),
    "old_spectral_norm": (nn.utils.spectral_norm, 'torch.nn.utils.remove_spectral_norm(layer, "weight")'),
}
OTHERS = {"tensor": untracked, "buffer": buffered, "property": low_rank}


def fit(*callbacks, tmp_path, model, steps=2):
    module = CausalLM(model, optimizer)
    data = torch.utils.data.DataLoader(torch.cat(BATCHES), batch_size=1)
    trainer_of([*callbacks], tmp_path, max_steps=steps, accumulate_grad_batches=1).fit(module, data)
    return module


ENTRANCES = {
    "prune": lambda model, path: prune_sequentially(model, None, HALF, progress=False),
    "calibrated": lambda model, path: prune_sequentially(model, BATCHES, SparseGPT(NM(2, 4)), progress=False),
    "units": lambda model, path: prune_sequentially(model, BATCHES, Structured(Columns(0.5)), progress=False),
    "permute": lambda model, path: permute_channels_(model, BATCHES, NM(2, 4), progress=False),
    "csr": lambda model, path: convert_to_csr_(model),
    "compressed": lambda model, path: save_compressed(model, MaskSet({}), path),
    "save": lambda model, path: save_sparse_model(model, MaskSet({}), path),
}
FITS = {
    "OneShotPrune": lambda: [OneShotPrune(HALF), MaskEnforcer()],
    "IterativePrune": lambda: [IterativePrune(ConstantSchedule(0.5)), MaskEnforcer()],
    "MaskEnforcer": lambda: [MaskEnforcer()],
    "QuantizeWeights": lambda: [QuantizeWeights("never", batches=BATCHES)],
}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_is_named_with_what_removes_it(kind, entrance, tmp_path):
    change, remedy = COMPUTED[kind]
    model = model_with(change)
    before = state(model)
    with pytest.raises(ValueError, match=f"layer {NAME}: its weight is computed by ") as error:
        ENTRANCES[entrance](model, tmp_path)
    assert remedy in str(error.value)
    assert same(before, state(model))
    assert not list(tmp_path.iterdir())
    exec(remedy, {"torch": torch, "layer": model.get_submodule(NAME)})
    ENTRANCES[entrance](model, tmp_path)  # what the sentence says helps


@pytest.mark.parametrize("entrance", ["prune", "calibrated", "units", "permute", "csr"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_weight_that_is_no_parameter_is_named(kind, entrance, tmp_path):
    with pytest.raises(ValueError, match=f"layer {NAME}: its weight is no parameter but .*; make it an nn.Parameter"):
        ENTRANCES[entrance](model_with(OTHERS[kind]), tmp_path)


@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
@pytest.mark.parametrize("who", FITS)
def test_every_callback_names_it_before_the_first_step(who, kind, tmp_path):
    model = model_with(COMPUTED[kind][0])
    before = state(model)
    with pytest.raises(ValueError, match=f"layer {NAME}: its weight is computed by .*remove"):
        fit(*FITS[who](), tmp_path=tmp_path, model=model)
    assert same(before, state(model))


@pytest.mark.parametrize("kind", [*COMPUTED, *OTHERS])
@pytest.mark.parametrize(
    "pruner", [HALF, SparseGPT(Unstructured(0.5)), Structured(Columns(0.5))], ids=lambda p: type(p).__name__
)
def test_layers_that_are_no_targets_may_be_computed(kind, pruner):
    """Equivalent to pruning a model whose layer has the computed weight as its parameter."""
    model = model_with(COMPUTED[kind][0] if kind in COMPUTED else OTHERS[kind]).eval()
    model(BATCHES[0])
    plain = tiny_llama(hidden_size=16, layers=2).eval()
    plain.get_submodule(NAME).weight.data = model.get_submodule(NAME).weight.detach().clone()
    targets = ["*.self_attn.*"]
    for one in (model, plain):
        prune_sequentially(one, BATCHES, pruner, targets=targets, progress=False)
    names = [name for name, _ in plain.named_parameters() if "self_attn" in name]
    assert all(torch.equal(model.get_parameter(name), plain.get_parameter(name)) for name in names)
    assert any(bool((model.get_parameter(name) == 0).any()) for name in names)


@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
def test_zeros_are_held_beside_a_computed_layer(kind, tmp_path):
    model = model_with(COMPUTED[kind][0])
    one_shot = OneShotPrune(HALF, targets=["q_proj", "up_proj"])
    fit(one_shot, MaskEnforcer(), tmp_path=tmp_path, model=model, steps=3)
    assert not one_shot.report.masks.violations(model.named_parameters())
    assert one_shot.report.masks.sparsity() == 0.5
    trained = [name for name, _ in model.named_parameters() if name.startswith(NAME)]
    assert trained
    assert "weight" not in [name.removeprefix(f"{NAME}.") for name in trained]


def test_a_folder_that_could_not_be_loaded_is_refused_before_pruning(tmp_path):
    model = model_with(COMPUTED["weight_norm"][0])
    before = state(model)
    one_shot = OneShotPrune(HALF, targets=["q_proj"], dirpath=tmp_path / "sparse")
    with pytest.raises(ValueError, match=f"could not be loaded from its files, because of layer {NAME}: its weight is"):
        fit(one_shot, MaskEnforcer(), tmp_path=tmp_path, model=model)
    assert same(before, state(model))


def parametrized_bias(layer):
    layer.bias = nn.Parameter(torch.ones(len(layer.weight)))
    parametrize.register_parametrization(layer, "bias", Halved())


def test_a_computed_bias_is_no_obstacle_but_where_it_moves(tmp_path):
    model, plain = model_with(parametrized_bias), tiny_llama(hidden_size=16, layers=2)
    plain.get_submodule(NAME).bias = nn.Parameter(torch.full((16,), 0.5))
    for one in (model, plain):
        prune_sequentially(one, BATCHES, SparseGPT(Unstructured(0.5)), progress=False)
    assert torch.equal(model(BATCHES[0]).logits, plain(BATCHES[0]).logits)
    with pytest.raises(ValueError, match=f"because of layer {NAME}: its bias is computed by Halved"):
        save_compressed(model, MaskSet({}), tmp_path)
    permute_channels_(model, BATCHES, NM(2, 4), progress=False)  # its rows keep their order
    with pytest.raises(
        ValueError, match=r"layer model.layers.1.mlp.up_proj: its bias is computed by Halved .*\"bias\""
    ):
        permute_channels_(
            model_with(parametrized_bias, "model.layers.1.mlp.up_proj"), BATCHES, NM(2, 4), progress=False
        )


class Packed(torch.Tensor):
    """A tensor with arithmetic of its own, as quantized weights of torchao and sharded ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, "the weight was used"
        return Packed(args[0].inner)


def replaced(make, **settings):
    def change(layer):
        layer.weight = nn.Parameter(make(layer.weight.detach().clone()), **settings)

    return change


UNFIT = {
    "complex": (replaced(lambda w: w.cfloat()), "its weight is torch.complex64; complex weights cannot be pruned"),
    "float8": (
        replaced(lambda w: w.to(torch.float8_e5m2), requires_grad=False),
        "torch.float8_e5m2; quantized weights",
    ),
    "int8": (
        replaced(lambda w: w.to(torch.int8), requires_grad=False),
        "torch.int8; quantized weights cannot be pruned",
    ),
    "packed": (replaced(Packed), "its weight is a Packed, a tensor that is quantized, sharded or"),
    "csr": (replaced(lambda w: w.to_sparse_csr()), "stored as torch.sparse_csr; convert it back to a dense tensor"),
    "meta": (replaced(lambda w: w.to("meta")), "its weight is on the meta device, without values"),
    "empty": (replaced(lambda w: w[:0]), r"its weight has shape \(0, 48\), so there is nothing to prune"),
    "expanded": (replaced(lambda w: w[:, :1].expand(16, 48)), "one number in memory stands for several weights"),
    "strided": (replaced(lambda w: w.as_strided((16, 48), (7, 1))), "one number in memory stands for several weights"),
}


@pytest.mark.parametrize("entrance", ["prune", "calibrated", "units", "permute"])
@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_weight_that_cannot_be_overwritten_is_named(kind, entrance, tmp_path):
    change, text = UNFIT[kind]
    with pytest.raises(ValueError, match=f"layer {NAME}: .*{text}"):
        ENTRANCES[entrance](model_with(change), tmp_path)


@pytest.mark.parametrize("kind", ["complex", "packed", "expanded", "float8"])
def test_rounds_name_it_before_the_first_step(kind, tmp_path):
    with pytest.raises(ValueError, match=f"layer {NAME}: .*{UNFIT[kind][1]}"):
        fit(*FITS["IterativePrune"](), tmp_path=tmp_path, model=model_with(UNFIT[kind][0]))


def test_a_lazy_layer_is_named():
    model = tiny_llama(hidden_size=16, layers=2)
    model.model.layers[1].mlp.down_proj = nn.LazyLinear(16, bias=False)
    with pytest.raises(ValueError, match=f"layer {NAME} is lazy and has no weights yet; run the model once"):
        prune_sequentially(model, None, HALF, progress=False)
    model(BATCHES[0])
    assert prune_sequentially(model, None, HALF, progress=False).masks.sparsity() == 0.5


def inferred(weight):
    with torch.inference_mode():
        return weight.clone()


def of_a_buffer(layers):
    buffer = torch.cat([layer.weight.detach().flatten() for layer in layers])
    for layer, part in zip(layers, buffer.chunk(len(layers)), strict=True):
        layer.weight.data = part.view(layer.weight.shape)


def interleaved(layers):
    """As the rows of one matrix that belong to the layers by turns."""
    matrix = torch.stack([layer.weight.detach() for layer in layers], 1)
    for number, layer in enumerate(layers):
        layer.weight.data = matrix[:, number]


FINE = {
    "frozen": lambda model: model.get_submodule(NAME).weight.requires_grad_(False),
    "inference": lambda model: replaced(inferred, requires_grad=False)(model.get_submodule(NAME)),
    "transposed": lambda model: replaced(lambda w: w.T.contiguous().T)(model.get_submodule(NAME)),
    "one buffer": lambda model: of_a_buffer([block.mlp.down_proj for block in model.model.layers]),
    "interleaved": lambda model: interleaved([block.mlp.down_proj for block in model.model.layers]),
}


@pytest.mark.parametrize(
    "pruner", [HALF, SparseGPT(NM(2, 4)), Structured(Columns(0.5))], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("kind", FINE)
def test_other_ways_to_keep_a_weight_change_nothing(kind, pruner):
    model, plain = (tiny_llama(hidden_size=16, layers=2) for _ in range(2))
    FINE[kind](model)
    reports = [prune_sequentially(one, BATCHES, pruner, progress=False) for one in (model, plain)]
    assert reports[0].masks == reports[1].masks
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-6, check_stride=False)


def test_two_parameters_in_one_memory_are_one_weight():
    model, tied = (tiny_llama(hidden_size=16, layers=2) for _ in range(2))
    first, second = (block.mlp.down_proj for block in model.model.layers)
    second.weight.data = first.weight.data
    tied.model.layers[1].mlp.down_proj.weight = tied.model.layers[0].mlp.down_proj.weight
    reports = []
    for one in (model, tied):
        with pytest.warns(
            UserWarning, match=f"{NAME} shares its weight with model.layers.0.mlp.down_proj and is pruned"
        ):
            reports.append(prune_sequentially(one, BATCHES, SparseGPT(Unstructured(0.5)), progress=False))
    assert reports[0].masks == reports[1].masks
    assert same(state(model), state(tied))


@pytest.mark.parametrize("rounds", [False, True])
def test_weights_that_share_some_numbers_are_refused(rounds, tmp_path):
    model = tiny_llama(hidden_size=16, layers=2)
    buffer = torch.randn(16 * 48 + 48)
    for number, block in enumerate(model.model.layers):
        block.mlp.down_proj.weight.data = buffer[48 * number :][: 16 * 48].view(16, 48)
    before = state(model)
    callbacks = FITS["IterativePrune" if rounds else "OneShotPrune"]()
    with pytest.raises(ValueError, match=f"layers model.layers.0.mlp.down_proj and {NAME} share a part of their weig"):
        fit(*callbacks, tmp_path=tmp_path, model=model)
    assert same(before, state(model))


def test_a_model_that_its_configuration_does_not_describe_is_not_compressed(tmp_path):
    model = tiny_llama(hidden_size=16, layers=2)
    model.get_submodule(NAME).bias = nn.Parameter(torch.ones(16))
    with pytest.raises(
        ValueError, match=rf"1 tensors differ, first {NAME}.bias, which is \(16,\) in the model and missing"
    ):
        save_compressed(model, MaskSet({}), tmp_path)
