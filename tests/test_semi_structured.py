"""2:4 conversion: what decides, what is refused and why, verification, and the way back; kernels are stood in for."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from fits import optimizer, trainer_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.utils.data import DataLoader
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

from prune_callbacks import NM, CausalLM, LoRARecovery, Magnitude, MaskEnforcer, OneShotPrune, prune_sequentially
from prune_callbacks.callbacks.semi_structured_convert import SemiStructuredConvert
from prune_callbacks.deploy import low_precision, semi_structured
from prune_callbacks.deploy.backends import Hardware, choose_backend, why_not, why_not_two_four
from prune_callbacks.deploy.low_precision import (
    FP8,
    INT8,
    QuantizedLinear,
    choose_quantized,
    convert_fp8_,
    convert_int8_,
    quantize_rows,
)
from prune_callbacks.deploy.semi_structured import convert_, revert_
from prune_callbacks.tasks import tiny_llama

IDS = torch.randint(3, 200, (2, 13), generator=torch.Generator().manual_seed(1))
AMPERE, HOPPER = Hardware(True, (8, 0), None), Hardware(True, (9, 0), 602)


class OnCpu(SparseSemiStructuredTensorCUTLASS):
    """CUTLASS's layout and torch's own dispatch; only the product is taken on the unpacked weight."""

    @classmethod
    def pack(cls, weight):
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        return cls(weight.shape, packed, meta, None, None, None)

    def _mm(self, B, *, bias=None, should_transpose_dense=False, **_):
        y = self.unpacked() @ (B.t() if should_transpose_dense else B)
        y = y if bias is None else y + bias[:, None]
        return self.product(y.t()) if should_transpose_dense else y

    def unpacked(self):
        return sparse_semi_structured_to_dense_cutlass(self.packed, self.meta)

    def product(self, y):
        return y.contiguous()


class OffByThreePercent(OnCpu):
    def product(self, y):
        return y * 1.03


class LosesAWeight(OnCpu):
    def to_dense(self):
        weight = self.unpacked()
        row, column = weight.nonzero()[0]
        weight[row, column] = 0
        return weight


class NotANumber(OnCpu):
    def product(self, y):
        return y * float("nan")


class Fails(OnCpu):
    def product(self, y):
        raise NotImplementedError("no such kernel")


@pytest.fixture
def stand_in(monkeypatch):
    """A GPU for CUTLASS, whose kernels are `OnCpu`, or another class for the layers that it is named for."""

    def use(model, **others):
        def compress(weight, bias, backend):
            assert backend == "cutlass"
            dense = [n for n in linears(model) if type(model.get_submodule(n).weight) is nn.Parameter]
            (owner,) = (n for n in dense if model.get_submodule(n).weight.data_ptr() == weight.data_ptr())
            return others.get(owner.rsplit(".", 1)[-1], OnCpu).pack(weight)

        monkeypatch.setattr(Hardware, "of", staticmethod(lambda device: AMPERE))
        monkeypatch.setattr(semi_structured, "compress", compress)
        return model

    return use


def sparse_llama(pattern=None, dtype=torch.bfloat16):
    model = tiny_llama(hidden_size=64, layers=2)
    prune_sequentially(model, None, Magnitude(pattern or NM(2, 4)), progress=False)
    return model.to(dtype)


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]


def is_sparse(model, name):
    return isinstance(model.get_submodule(name).weight, SparseSemiStructuredTensor)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert type(after[name]) is torch.Tensor
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value)


# Decisions


@pytest.mark.parametrize(
    ("hardware", "backend", "reason"),
    [
        (Hardware(False, None, None), None, "no NVIDIA GPU"),
        (Hardware(True, None, 602), None, r'the model is on the CPU.*model.to\("cuda"\)'),
        (Hardware(True, (7, 5), 602), None, "capability 7.5; 2:4 needs 8.0"),
        (Hardware(True, (8, 0), None), "cutlass", None),
        (Hardware(True, (8, 9), 702), "cutlass", None),
        (Hardware(True, (9, 0), None), None, "needs cuSPARSELt, and this torch is built without"),
        (Hardware(True, (9, 0), 602), "cusparselt", None),
        (Hardware(True, (12, 0), 702), "cusparselt", None),
    ],
)
def test_the_back_end_follows_from_the_hardware(hardware, backend, reason):
    choice = choose_backend(hardware)
    assert choice.backend == backend
    assert (choice.reason is None) if reason is None else re.search(reason, choice.reason)


@pytest.mark.parametrize(
    ("grid", "hardware", "reason"),
    [
        (INT8, Hardware(False, None, None), "no NVIDIA GPU"),
        (INT8, Hardware(True, (7, 5), 602), "2:4 in int8 needs 8.0"),
        (INT8, Hardware(True, (8, 0), None), "cuSPARSELt 400 or newer, this has none"),
        (INT8, Hardware(True, (8, 0), 502), None),
        (FP8, Hardware(True, (8, 9), 602), "2:4 in float8_e4m3fn needs 9.0"),
        (FP8, Hardware(True, (9, 0), 502), "cuSPARSELt 602 or newer, this has version 502"),
        (FP8, Hardware(True, (10, 0), 602), None),
    ],
)
def test_eight_bits_need_cusparselt_that_is_new_enough(grid, hardware, reason):
    backend, why = choose_quantized(hardware, grid)
    assert (backend == "cusparselt") == (reason is None)
    assert (why is None) if reason is None else (reason in why)


@pytest.mark.parametrize(
    ("shape", "dtype", "backend", "reason"),
    [
        ((32, 64), torch.float16, "cutlass", None),
        ((576, 1536), torch.bfloat16, "cutlass", None),
        (
            (16, 64),
            torch.bfloat16,
            "cutlass",
            "the weight is (16, 64), and cutlass takes bfloat16 in multiples of (32, 64",
        ),
        ((32, 96), torch.float16, "cutlass", "multiples of (32, 64)"),
        ((16, 16), torch.float16, "cusparselt", None),
        ((24, 16), torch.float16, "cusparselt", "multiples of (16, 16)"),
        ((0, 16), torch.float16, "cusparselt", "multiples of (16, 16)"),
        ((16, 16, 16), torch.float16, "cusparselt", "the weight is (16, 16, 16)"),
        ((48, 64), torch.int8, "cusparselt", "multiples of (32, 32)"),
        ((64, 64), torch.float32, "cutlass", "the weight is float32, and cutlass takes int8, float16, bfloat16: cast"),
        ((64, 64), torch.float32, "cusparselt", "float32"),
        ((64, 64), torch.float64, "cutlass", "float64"),
    ],
)
def test_shapes_and_dtypes_that_a_back_end_takes(shape, dtype, backend, reason):
    found = why_not(shape, dtype, backend)
    assert (found is None) if reason is None else (reason in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_accepted_shape_is_packed_by_torch_without_loss(dtype):
    weight = torch.randn(96, 192).to(dtype)
    weight *= NM(2, 4).keep(weight.abs().float())
    assert why_not(weight.shape, dtype, "cutlass") is None
    assert torch.equal(OnCpu.pack(weight).unpacked(), weight)
    # The control: half as many rows are refused by both.
    assert why_not((16, 192), dtype, "cutlass")
    with pytest.raises(RuntimeError, match="divisible by 32"):
        OnCpu.pack(weight[:16])


def test_float32_would_lose_weights_and_is_refused():
    """CUTLASS lists float32, for 1:2."""
    weight = torch.randn(32, 64)
    weight *= NM(2, 4).keep(weight.abs())
    assert not torch.equal(OnCpu.pack(weight).unpacked(), weight)
    assert why_not(weight.shape, torch.float32, "cutlass")


def test_two_four_is_told_from_other_patterns():
    scores = torch.rand(8, 32)
    for pattern in (NM(2, 4), NM(1, 4)):
        assert why_not_two_four(pattern.keep(scores).float()) is None
    assert why_not_two_four(torch.zeros(8, 32)) is None
    four_eight = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]])
    assert NM(4, 8).holds(four_eight != 0)
    assert why_not_two_four(four_eight) == "not 2:4: 1 of 4 groups of four keep more than two weights"
    assert why_not_two_four(torch.ones(8, 30)) == "not 2:4: the input size 30 is not divisible by 4"


# The conversion


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4)], ids=str)
def test_every_layer_is_converted_and_comes_back(pattern, dtype, stand_in):
    model = stand_in(sparse_llama(pattern, dtype))
    frozen = "model.layers.1.mlp.up_proj"
    model.get_submodule(frozen).weight.requires_grad_(False)
    before, wanted = snapshot(model), model(IDS).logits.detach().float()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    conversion = convert_(model, progress=False)
    assert conversion.backend == "cutlass"
    assert list(conversion.converted) == linears(model)
    assert len(conversion.converted) == 14
    assert not conversion.skipped
    assert all(is_sparse(model, name) for name in conversion.converted)
    assert list(model.state_dict()) == list(before)
    # Half of the values, and two bits for each of them.
    assert conversion.bytes_after == conversion.bytes_before * (1 / 2 + 1 / 16)
    assert conversion.bytes_before == sum(before[f"{name}.weight"].nbytes for name in conversion.converted)
    assert conversion.errors.keys() == set(conversion.converted)
    assert max(conversion.errors.values()) < 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(IDS).logits.float(), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))

    revert_(model)
    assert_same(model, before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert not trained[f"{frozen}.weight"]
    revert_(model)  # nothing is left to do
    assert_same(model, before)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (OffByThreePercent, r"its output is off by 0\.03\d? of the norm, where 0\.016 is allowed"),
        (NotANumber, "its output is off by nan of the norm"),
        (Fails, "NotImplementedError: no such kernel"),
    ],
)
def test_a_layer_with_wrong_outputs_stays_dense(kernel, reason, stand_in):
    model = stand_in(sparse_llama(), down_proj=kernel)
    before = snapshot(model)
    with pytest.warns(UserWarning, match=rf"2 of 14 layers stay dense: model.layers.0.mlp.down_proj.*{reason}"):
        conversion = convert_(model, progress=False)
    wrong = [name for name in linears(model) if "down_proj" in name]
    assert list(conversion.skipped) == wrong
    assert len(conversion.converted) == 12
    assert [name for name in linears(model) if not is_sparse(model, name)] == wrong
    revert_(model)
    assert_same(model, before)


def test_control_without_verification_wrong_outputs_get_through(stand_in):
    model = stand_in(sparse_llama(), down_proj=OffByThreePercent)
    conversion = convert_(model, verify=False, progress=False)
    assert len(conversion.converted) == 14
    assert conversion.errors == {}


def test_a_layer_that_would_not_come_back_stays_dense_verified_or_not(stand_in):
    model = stand_in(sparse_llama(), k_proj=LosesAWeight)
    with pytest.warns(UserWarning, match="k_proj.*does not give the weight back"):
        conversion = convert_(model, verify=False, progress=False)
    assert set(conversion.skipped) == {f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)}


def test_layers_of_another_pattern_or_shape_are_named(stand_in):
    model = stand_in(sparse_llama())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1)
    model.model.layers[1].self_attn.q_proj = nn.Linear(64, 72, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(model.model.layers[1].self_attn.q_proj.weight)
    with pytest.warns(UserWarning, match="2 of 14 layers stay dense"):
        conversion = convert_(model, progress=False)
    reasons = conversion.skipped
    assert reasons["model.layers.0.mlp.up_proj"].startswith("not 2:4: 3,072 of 3,072 groups")
    assert "(72, 64), and cutlass takes bfloat16 in multiples of (32, 64)" in reasons["model.layers.1.self_attn.q_proj"]
    assert len(conversion.converted) == 12


def test_a_model_that_was_moved_comes_back_too(stand_in):
    """`model.cpu()` sets the data of 2:4 tensors to dense ones; a layer may also hold a plain tensor by then."""
    model = stand_in(sparse_llama())
    before = snapshot(model)
    convert_(model, progress=False)
    model._apply(lambda tensor: tensor.to_dense() if isinstance(tensor, SparseSemiStructuredTensor) else tensor)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to_dense(), requires_grad=False)
    revert_(model)
    assert_same(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_targets_choose_layers(stand_in):
    model = stand_in(sparse_llama())
    conversion = convert_(model, targets="*.mlp.*", progress=False)
    assert len(conversion.converted) == 6
    assert not is_sparse(model, "model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match="matches no layer"):
        convert_(sparse_llama(), targets="nothing", progress=False)


def test_float32_models_are_told_to_be_cast(stand_in):
    model = stand_in(sparse_llama(dtype=torch.float32))
    with pytest.warns(UserWarning, match=r"14 of 14 .*float32.*model.bfloat16\(\)"):
        assert convert_(model, progress=False).converted == ()


def test_shared_weights_are_left_alone(stand_in):
    model = stand_in(sparse_llama())
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.gate_proj.weight = first.gate_proj.weight
    second.up_proj = first.up_proj
    before = snapshot(model)
    with pytest.warns(UserWarning, match="shares its weight with model.layers.1.mlp.gate_proj"):
        conversion = convert_(model, progress=False)
    assert set(conversion.skipped) == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}
    assert len(conversion.converted) == 10
    revert_(model)
    assert_same(model, before)
    assert second.gate_proj.weight is first.gate_proj.weight


def test_conv1d_is_named(stand_in):
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=259, n_positions=32)).bfloat16()
    with pytest.warns(UserWarning, match=r"4 of 4 layers stay dense.*Conv1D stores its weight as \(in, out\)"):
        conversion = convert_(stand_in(model), progress=False)
    assert len(conversion.skipped) == 4


def test_linear_layers_with_a_forward_of_their_own_are_named(stand_in):
    """Falcon's transposes its weight, which a 2:4 tensor refuses."""
    config = FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=259)
    model = FalconForCausalLM(config).bfloat16()
    prune_sequentially(model, None, Magnitude(NM(2, 4)), progress=False)
    with pytest.warns(UserWarning, match=r"4 of 4 layers stay dense.*a FalconLinear multiplies in its own way"):
        conversion = convert_(stand_in(model), progress=False)
    assert len(conversion.skipped) == 4


@pytest.mark.parametrize("convert", [convert_, convert_int8_, convert_fp8_])
@pytest.mark.parametrize("pattern", [None, NM(4, 8)], ids=str)
def test_a_model_without_two_four_is_refused_on_any_machine(pattern, convert):
    model = tiny_llama(hidden_size=64, layers=2)
    if pattern is not None:
        prune_sequentially(model, None, Magnitude(pattern), progress=False)
    with pytest.raises(ValueError, match=r"none of the 14 layers is 2:4.*keep more than two.*NM\(2, 4\) first"):
        convert(model)


@pytest.mark.parametrize("convert", [convert_, convert_int8_, convert_fp8_])
def test_without_a_gpu_the_model_stays_dense_and_says_so(convert):
    model = sparse_llama()
    before = snapshot(model)
    with pytest.warns(UserWarning, match="the model stays dense: "):  # a model on the CPU, whatever the machine has
        conversion = convert(model)
    assert conversion.backend is None
    assert "GPU" in conversion.reason
    assert conversion.converted == ()
    assert_same(model, before)


def test_a_converted_model_is_not_converted_again(stand_in):
    model = stand_in(sparse_llama())
    convert_(model, progress=False)
    for convert in (convert_, convert_int8_):
        with pytest.raises(ValueError, match=r"14 layers are converted already.*revert_\(model\)"):
            convert(model)


# Eight bits


@dataclass(frozen=True)
class Plain:
    """The product on the unpacked weight."""

    accumulator: torch.dtype
    factor: int = 1

    def pack(self, weight):
        assert NM(2, 4).holds(weight.float() != 0)
        return weight, 7

    def multiply(self, packed, x, algorithm):
        assert algorithm == 7
        assert len(x) % 16 == 0
        wide = torch.int32 if self.accumulator == torch.int32 else torch.float32
        return self.factor * (x.to(wide) @ packed.to(wide).T).to(self.accumulator)


def e4m3():
    """Every finite value: 3 bits of mantissa, exponents with bias 7, subnormals of 2^-9, and no 480 (that is NaN)."""
    positive = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
    positive = torch.tensor([v for v in positive if v <= 448], dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


def reference(x, grid):
    """Row by row in float64."""
    rows = []
    for row in x.double():
        scale = row.abs().max() / (127 if grid is INT8 else 448) if row.any() else 1
        values = row / scale
        if grid is INT8:
            values = torch.tensor([float(round(v)) for v in values.tolist()], dtype=torch.float64)
        else:
            values = e4m3()[(values[:, None] - e4m3()).abs().argmin(1)]
        rows.append(values * scale)
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_products_are_those_of_the_reference(grid, bias):
    layer = nn.Linear(64, 32, bias=bias)
    with torch.no_grad():
        layer.weight *= NM(2, 4).keep(layer.weight.abs())
        layer.weight[3] *= 100  # rows have their own scales
        layer.weight[5] = 0
    x = torch.randn(3, 7, 64) * torch.logspace(-3, 3, 7)[:, None]  # and so have tokens
    made = QuantizedLinear(layer, grid, Plain(grid.accumulator))
    wanted = reference(x.flatten(0, 1), grid) @ reference(layer.weight.detach(), grid).T
    if bias:
        wanted = wanted + layer.bias.detach().double()
    got = made(x)
    assert got.shape == (3, 7, 32)
    assert got.is_contiguous()
    scale = wanted.abs().amax(1, keepdim=True)
    torch.testing.assert_close(got.flatten(0, 1).double() / scale, wanted / scale, rtol=0, atol=3e-6)
    # It is the quantized product, not the dense one.
    assert ((got - layer(x)).flatten(0, 1).double() / scale).abs().max() > 1e-3


@pytest.mark.parametrize("grid", [INT8, FP8], ids=["int8", "fp8"])
def test_grids_keep_zeros_and_reach_their_ends(grid):
    x = torch.tensor([[0.0, -2.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [1e-30, 0.0, 0.0, -1e-30]])
    values, scale = quantize_rows(x, grid)
    assert values.dtype == grid.dtype
    assert torch.equal(values[:2].float() == 0, x[:2] == 0)
    assert values[0, 1].float() == -grid.largest
    assert values.float().isfinite().all()
    torch.testing.assert_close(values.float() * scale, x, rtol=0.07, atol=1e-36)


@pytest.fixture
def eight_bits(monkeypatch):
    """A GPU with cuSPARSELt, whose kernels are `Plain`."""

    def use(**settings):
        monkeypatch.setattr(Hardware, "of", staticmethod(lambda device: HOPPER))
        monkeypatch.setattr(low_precision, "CuSparseLt", lambda accumulator: Plain(accumulator, **settings))

    return use


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("convert", "least"), [(convert_int8_, 0.005), (convert_fp8_, 0.02)])
def test_eight_bit_models_come_back(convert, least, dtype, eight_bits):
    eight_bits()
    model = sparse_llama(dtype=dtype)
    before, parameters = snapshot(model), dict(model.named_parameters())
    wanted = model(IDS).logits.float()
    conversion = convert(model, progress=False)
    assert conversion.backend == "cusparselt"
    assert len(conversion.converted) == 14
    # The roundings show, and stay within the tolerance.
    assert all(least < error < 0.08 for error in conversion.errors.values())
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in conversion.converted)
    assert not [name for name, _ in model.named_parameters() if "_proj" in name]
    assert (model(IDS).logits.float() - wanted).norm() / wanted.norm() < 0.2
    revert_(model)
    assert_same(model, before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_a_wrong_eight_bit_product_is_caught(eight_bits):
    eight_bits(factor=2)
    model = sparse_llama()
    before = snapshot(model)
    with pytest.warns(UserWarning, match="14 of 14 layers stay dense.*where 0.05 is allowed"):
        assert convert_int8_(model, progress=False).converted == ()
    assert_same(model, before)


# The callback


def fit(callbacks, tmp_path, model=None, **settings):
    module = CausalLM(model or tiny_llama(hidden_size=64, layers=2), optimizer)
    data = DataLoader(torch.randint(3, 200, (8, 16)), 4)
    trainer = trainer_of(callbacks, tmp_path, max_steps=2, accumulate_grad_batches=1, **settings)
    trainer.fit(module, data)
    return module


def one_shot():
    return OneShotPrune(Magnitude(NM(2, 4)), progress=False)


class Look(Callback):
    """Which layers are sparse when `on_fit_end` comes to this callback."""

    def on_fit_end(self, trainer, pl_module):
        self.sparse = [name for name in linears(pl_module.model) if is_sparse(pl_module.model, name)]


@pytest.mark.parametrize("precision", ["model", "int8", "fp8"])
def test_a_fit_on_the_cpu_warns_and_stays_dense(precision, tmp_path):
    enforcer, convert = MaskEnforcer(), SemiStructuredConvert(precision=precision)
    with pytest.warns(UserWarning, match="SemiStructuredConvert: the model stays dense: "):
        module = fit([one_shot(), enforcer, convert], tmp_path)
    assert convert.conversion.backend is None
    assert enforcer.masks.violations(module.named_parameters()) == {}
    assert not [name for name in linears(module.model) if is_sparse(module.model, name)]


def test_a_fit_ends_with_a_converted_model(tmp_path, stand_in):
    model = stand_in(tiny_llama(hidden_size=64, layers=2))
    enforcer, convert, before, after = MaskEnforcer(), SemiStructuredConvert(progress=False), Look(), Look()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [one_shot(), enforcer, before, convert, after, checkpoint]
    module = fit(callbacks, tmp_path, model, precision="bf16-true", enable_checkpointing=True)
    assert len(convert.conversion.converted) == 14
    assert (len(before.sparse), len(after.sparse)) == (0, 14)
    assert len([name for name in linears(module.model) if is_sparse(module.model, name)]) == 14
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert all(type(value) is torch.Tensor for value in saved.values())
    revert_(module)
    assert_same(module, saved)
    assert enforcer.masks.violations(module.named_parameters()) == {}


def test_a_dense_model_does_not_fail_its_fit(tmp_path):
    convert = SemiStructuredConvert()
    with pytest.warns(UserWarning, match=r"SemiStructuredConvert: .*none of the 14 layers is 2:4"):
        fit([convert], tmp_path)
    assert convert.conversion is None


@pytest.mark.parametrize("late", [one_shot, MaskEnforcer, LoRARecovery])
def test_who_reads_weights_must_stand_before(late, tmp_path):
    with pytest.raises(ValueError, match=rf"SemiStructuredConvert stands before {type(late()).__name__}.*after them"):
        fit([SemiStructuredConvert(), late()], tmp_path)


def test_names_that_match_nothing_are_known_before_the_fit(tmp_path):
    with pytest.raises(ValueError, match="matches no layer"):
        fit([one_shot(), MaskEnforcer(), SemiStructuredConvert("q_porj")], tmp_path)


def test_sharded_strategies_are_refused(unchecked):
    callback = SemiStructuredConvert()
    trainer = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy), callbacks=[callback])
    with pytest.raises(ValueError, match="SemiStructuredConvert does not work under ModelParallelStrategy"):
        callback.setup(trainer, None, "fit")


def test_unknown_precisions_are_refused(unchecked):
    with pytest.raises(
        ValueError, match=r"must be one of \['model', 'bfloat16', 'float16', 'int8', 'fp8'\], got 'int4'"
    ):
        SemiStructuredConvert(precision="int4")
