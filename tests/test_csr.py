import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear
from transformers import GPT2Config, GPT2LMHeadModel

from prune_callbacks import MaskSet
from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.targets import find_targets
from prune_callbacks.deploy.csr import CSRLinear, break_even_sparsity, compressed, convert_to_csr_, revert_csr_
from prune_callbacks.deploy.csr_files import load_csr, save_csr

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def sparse(tiny):
    """The tiny Llama with 80 % zeros in its blocks, in places drawn at random."""
    layers = find_targets(find_blocks(tiny))
    masks = MaskSet({f"{name}.weight": torch.rand(target.shape) > 0.8 for name, target in layers.items()})
    masks.apply_(tiny.named_parameters())
    return tiny.eval()


def bits(model):
    return {name: value.clone().view(torch.int32) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24), (1, 1, 24)], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_outputs_are_those_of_float64(shape, bias, mode):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(24, 40, bias=bias))])
    layer = model.layers[0][0]
    with torch.no_grad():
        layer.weight *= torch.rand(40, 24) > 0.7
        layer.weight[3] = 0  # an empty row
    exact = copy.deepcopy(layer).double()
    convert_to_csr_(model)
    assert layer.weight.layout is torch.sparse_csr
    assert layer.weight.crow_indices().dtype == layer.weight.col_indices().dtype == torch.int32
    x = torch.randn(shape)
    with mode():
        y = layer(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), exact(x.double()), atol=1e-5, rtol=1e-5)


def test_the_functional_linear_fails_where_ours_does_not():
    weight, x = nn.Parameter(compressed(torch.eye(4)), requires_grad=False), torch.randn(3, 4)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="version_counter"):
        linear(x, weight)


def test_bytes_are_those_of_hand_arithmetic():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(10, 6))])
    weight = torch.zeros(6, 10)
    weight[0, :4] = weight[5, 2:5] = 1  # 7 of 60
    model.layers[0][0].weight.data = weight
    report = convert_to_csr_(model)
    assert report.dense_bytes == 240
    assert report.csr_bytes == 7 * (4 + 4) + 7 * 4 == 84
    assert report.layers == {"layers.0.0": (240, 84)}
    assert report.sparsity == pytest.approx(53 / 60)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8)])
def test_at_the_break_even_sparsity_bytes_are_equal(dtype, size):
    sparsity = break_even_sparsity([(99, 100)], dtype)  # 100 offsets
    kept = (1 - sparsity) * 9900
    assert kept * (size + 4) + 400 == pytest.approx(9900 * size)
    assert break_even_sparsity([(576, 1536)]) == pytest.approx(0.5, abs=1e-3)
    assert break_even_sparsity([(576, 1536)]) > 0.5
    # and of a tensor with as many zeros
    weight = torch.zeros(9900, dtype=dtype)
    for count, fewer in ((int(kept) - 1, True), (int(kept) + 2, False)):
        weight[:count] = 1
        csr = compressed(weight.view(99, 100))
        total = csr.values().nbytes + csr.col_indices().nbytes + csr.crow_indices().nbytes
        assert (total < weight.nbytes) is fewer


def test_a_model_answers_the_same_and_comes_back_bit_for_bit(sparse):
    before, names, trained = bits(sparse), list(sparse.state_dict()), dict(sparse.named_parameters())
    trained = {name: p.requires_grad for name, p in trained.items()}
    calls = []
    first = next(iter(find_targets(find_blocks(sparse)).values())).module
    first.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = sparse(IDS).logits
        report = convert_to_csr_(sparse)
        assert len(report.layers) == 14
        assert report.csr_bytes < report.dense_bytes
        torch.testing.assert_close(sparse(IDS).logits, expected, atol=1e-5, rtol=1e-4)
        assert list(sparse.state_dict()) == names
        twin = copy.deepcopy(sparse)
        torch.testing.assert_close(twin(IDS).logits, expected, atol=1e-5, rtol=1e-4)
        assert len(calls) == 3  # the hook lasts, also in the copy
    revert_csr_(sparse)
    after = bits(sparse)
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert list(after) == names
    assert {name: p.requires_grad for name, p in sparse.named_parameters()} == trained
    assert not any(isinstance(m, CSRLinear) for m in sparse.modules())
    assert all("trainable" not in vars(m) for m in sparse.modules())


def test_targets_are_chosen_and_what_is_skipped_is_named(sparse):
    sparse.model.layers[1].self_attn.v_proj.weight = sparse.model.layers[1].self_attn.k_proj.weight
    with pytest.warns(UserWarning, match="shares its weight"):
        report = convert_to_csr_(sparse, targets=["*.1.self_attn.*"])
    assert list(report.layers) == [f"model.layers.1.self_attn.{kind}_proj" for kind in "qo"]
    assert report.skipped == {"model.layers.1.self_attn.k_proj": "another module shares its weight"}
    with pytest.raises(ValueError, match="CSR already"):
        convert_to_csr_(sparse, targets="*.1.self_attn.q_proj")


def test_gpt2_has_nothing_to_convert():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16))
    with pytest.raises(ValueError, match=r"no layer can be converted.*c_attn.*is a Conv1D"):
        convert_to_csr_(model)


def test_half_precision_and_other_devices_are_refused_before_anything_changes(sparse):
    sparse.model.layers[1].mlp.down_proj.bfloat16()
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is torch.bfloat16.*model.float"):
        convert_to_csr_(sparse)
    sparse.model.layers[1].mlp.down_proj.to(device="meta", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is on meta: CSR weights are for CPUs.*2:4"):
        convert_to_csr_(sparse)
    assert not any(isinstance(m, CSRLinear) for m in sparse.modules())
    # Control: the products that it spares the user.
    with pytest.raises(RuntimeError, match="not implemented"):
        compressed(torch.eye(4).bfloat16()) @ torch.ones(4, 2).bfloat16()


def test_a_file_holds_the_same_bits_and_as_many_bytes_as_are_said(sparse, tmp_path):
    path = tmp_path / "csr.safetensors"
    report = convert_to_csr_(sparse)
    size = save_csr(sparse, path)
    tensors = load_file(path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert size == path.stat().st_size == header + report.csr_bytes
    assert sum(t.nbytes for t in tensors.values()) == report.csr_bytes
    loaded = load_csr(path)
    assert list(loaded) == list(report.layers)
    for name, weight in loaded.items():
        ours = sparse.get_submodule(name).weight
        assert weight.shape == ours.shape
        for part in ("crow_indices", "col_indices", "values"):
            assert torch.equal(getattr(weight, part)(), getattr(ours, part)())
            assert getattr(weight, part)().dtype == getattr(ours, part)().dtype
    save_csr(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_files_that_are_no_csr_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="convert_to_csr_ first"):
        save_csr(tiny, tmp_path / "x")
    with pytest.raises(ValueError, match="no CSR file"):
        load_csr(tmp_path / "x")
    save_file({"a": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(ValueError, match="not one that save_csr wrote"):
        load_csr(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="not a readable CSR file"):
        load_csr(tmp_path / "x")
    # An index outside of the matrix would make the product read where it must not.
    parts = {"a.crow": torch.tensor([0, 1], dtype=torch.int32), "a.col": torch.tensor([7], dtype=torch.int32)}
    save_file(parts | {"a.values": torch.ones(1)}, tmp_path / "x", {"prune_callbacks.csr": json.dumps({"a": [1, 4]})})
    with pytest.raises(ValueError, match=r"not a readable CSR file.*col_indices"):
        load_csr(tmp_path / "x")
