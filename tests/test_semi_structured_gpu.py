"""2:4 kernels for real: conversion, verification, reversal and torch.compile. `make gpu`."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.sparse import SparseSemiStructuredTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from prune_callbacks import NM, CausalLM, Magnitude, MaskEnforcer, OneShotPrune, prune_sequentially
from prune_callbacks.callbacks.semi_structured_convert import SemiStructuredConvert
from prune_callbacks.deploy import semi_structured
from prune_callbacks.deploy.backends import TENSORS, Hardware, choose_backend
from prune_callbacks.deploy.conversion import StandIn
from prune_callbacks.deploy.low_precision import FP8, INT8, CuSparseLt, choose_quantized, convert_fp8_, convert_int8_
from prune_callbacks.deploy.semi_structured import convert_, revert_
from prune_callbacks.tasks import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONVERT = {"model": convert_, "int8": convert_int8_, "fp8": convert_fp8_}
TOLERANCE = {"int8": INT8.tolerance, "fp8": FP8.tolerance}
PRECISIONS = pytest.mark.parametrize("precision", ["model", "int8", "fp8"])


def backend(precision):
    """That of this machine, or the test is skipped with the reason."""
    hardware = Hardware.of(torch.device("cuda"))
    grids = {"int8": INT8, "fp8": FP8}
    choice = choose_quantized(hardware, grids[precision]) if precision in grids else choose_backend(hardware)
    if choice.backend is None:
        pytest.skip(choice.reason)
    return choice.backend


def tiny():
    return tiny_llama(hidden_size=64, layers=2)


def smollm2_like():
    """Two blocks with the shapes of SmolLM2-135M."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
    )


def sparse(model, pattern, dtype):
    prune_sequentially(model, None, Magnitude(pattern), progress=False)
    return model.to("cuda", dtype)


@PRECISIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4)], ids=str)
@pytest.mark.parametrize("make", [tiny, smollm2_like])
def test_models_are_converted_and_come_back(make, pattern, dtype, precision):
    wanted_backend = backend(precision)
    model = sparse(make(), pattern, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(3, 200, (3, 11), device="cuda")  # 33 tokens: no multiple of 8
    with torch.no_grad():
        dense = model(ids).logits.float()
        conversion = CONVERT[precision](model, progress=False)
        logits = model(ids).logits.float()
    assert conversion.backend == wanted_backend
    assert conversion.skipped == {}
    assert len(conversion.converted) == 14
    assert max(conversion.errors.values()) <= TOLERANCE.get(precision, 2 * torch.finfo(dtype).eps)
    assert conversion.bytes_after < conversion.bytes_before * (0.6 if precision == "model" else 0.36)
    assert (logits - dense).norm() / dense.norm() < (0.03 if precision == "model" else 0.2)
    stand_ins = [module for module in model.modules() if isinstance(module, StandIn)]
    assert len(stand_ins) == (0 if precision == "model" else 14)
    assert not any(module._original[0].weight.is_cuda for module in stand_ins)
    revert_(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(type(value) is torch.Tensor and torch.equal(value, before[name]) for name, value in after.items())
    assert all(parameter.is_cuda and parameter.requires_grad for parameter in model.parameters())


@PRECISIONS
def test_a_compiled_layer_computes_the_same(precision):
    backend(precision)
    model = sparse(smollm2_like(), NM(2, 4), torch.bfloat16)
    CONVERT[precision](model, progress=False)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 13, 1536, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, got = layer(x).float(), torch.compile(layer)(x).float()
    assert (got - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("grid", [INT8, FP8], ids=["int8", "fp8"])
def test_eight_bit_kernels_multiply(grid):
    """int8 is summed exactly."""
    backend("int8" if grid is INT8 else "fp8")
    weight = torch.randint(-100, 100, (64, 128), device="cuda").float()
    weight *= NM(2, 4).keep(weight.abs())
    x = torch.randint(-100, 100, (48, 128), device="cuda").float()
    weight, x = weight.to(grid.dtype), x.to(grid.dtype)
    kernel = CuSparseLt(grid.accumulator)
    packed, algorithm = kernel.pack(weight)
    y = kernel.multiply(packed, x, algorithm)
    assert y.dtype == grid.accumulator
    wanted = x.double() @ weight.double().T
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=0 if grid is INT8 else 1e-3 * float(wanted.abs().max()))


def test_wrong_weights_in_a_kernel_are_caught(monkeypatch):
    name = backend("model")
    model = sparse(tiny(), NM(2, 4), torch.bfloat16)
    monkeypatch.setattr(semi_structured, "compress", lambda weight, bias, _: TENSORS[name].from_dense(weight * 1.05))
    with pytest.warns(UserWarning, match="14 of 14 layers stay dense.*does not give the weight back"):
        assert convert_(model, progress=False).converted == ()


@PRECISIONS
def test_a_model_that_was_moved_comes_back_too(precision):
    backend(precision)
    model = sparse(tiny(), NM(2, 4), torch.bfloat16)
    before = {name: value.cpu() for name, value in model.state_dict().items()}
    CONVERT[precision](model, progress=False)
    revert_(model.cpu())
    for name, value in model.state_dict().items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, before[name])  # and on the CPU, or this raises


def test_a_model_on_the_cpu_is_told_to_move():
    model = tiny()
    prune_sequentially(model, None, Magnitude(NM(2, 4)), progress=False)
    with pytest.warns(UserWarning, match=r'the model is on the CPU; move it to the GPU first: model.to\("cuda"\)'):
        assert convert_(model).backend is None


@PRECISIONS
def test_a_fit_ends_with_a_converted_model(precision, tmp_path):
    backend(precision)
    enforcer, convert = MaskEnforcer(), SemiStructuredConvert(precision=precision, progress=False)
    module = CausalLM(tiny(), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-true",
        max_steps=5,
        callbacks=[OneShotPrune(Magnitude(NM(2, 4)), progress=False), enforcer, convert],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(torch.randint(3, 200, (20, 32)), 4))
    assert len(convert.conversion.converted) == 14
    layers = [module.model.get_submodule(name) for name in convert.conversion.converted]
    assert all(isinstance(m, StandIn) or isinstance(m.weight, SparseSemiStructuredTensor) for m in layers)
    with torch.no_grad():
        assert module.model(torch.randint(3, 200, (2, 9), device="cuda")).logits.isfinite().all()
    revert_(module)
    assert all(isinstance(module.model.get_submodule(name), nn.Linear) for name in convert.conversion.converted)
    assert enforcer.masks.violations(module.named_parameters()) == {}
