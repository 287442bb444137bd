"""Packed files: exact round trips, bytes as counted by hand, and errors for what does not belong into them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_structured import BATCHES, model_of

from prune_callbacks import (
    GPTQ,
    NM,
    Columns,
    Grid,
    Magnitude,
    MaskSet,
    SparseGPTQ,
    Structured,
    Unstructured,
    Wanda,
    load_compressed,
    measure_compression,
    prune_sequentially,
    save_compressed,
)
from prune_callbacks.deploy.packing import (
    pack_bits,
    pack_codes,
    pack_kept,
    pack_nm,
    unpack_bits,
    unpack_codes,
    unpack_kept,
    unpack_nm,
)
from prune_callbacks.writing import filled_folder

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@settings(deadline=None, max_examples=50)
@given(bits=st.integers(1, 8), count=st.integers(0, 40), seed=st.integers(0, 99))
def test_bits_round_trip_in_the_bytes_they_need(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2**bits, (count,), generator=generator)
    packed = pack_bits(numbers, bits)
    assert packed.numel() == math.ceil(count * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, count), numbers)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), generator=generator).to(torch.int8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, count), codes)


def test_two_bits_stand_in_the_order_that_a_person_would_write():
    assert pack_bits(torch.tensor([3, 0, 1, 2, 1]), 2).tolist() == [0b11000110, 0b01000000]


@settings(deadline=None, max_examples=50)
@given(
    nm=st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (2, 5)]),
    rows=st.integers(1, 4),
    groups=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    thinner=st.booleans(),
    seed=st.integers(0, 99),
)
def test_nm_round_trips(nm, rows, groups, dtype, thinner, seed):
    pattern, generator = NM(*nm), torch.Generator().manual_seed(seed)
    weight = torch.randint(-90, 90, (rows, groups * pattern.m), generator=generator)
    weight = (weight * pattern.keep(weight.double().abs())).to(dtype)
    if thinner:  # groups may keep fewer
        weight[torch.rand(weight.shape, generator=generator) < 0.3] = 0
    values, places = pack_nm(weight, pattern)
    assert values.shape == (rows, groups * pattern.n)
    assert values.dtype == dtype
    assert places.numel() == math.ceil(values.numel() * math.ceil(math.log2(pattern.m)) / 8)
    assert torch.equal(unpack_nm(values, places, pattern), weight)


def test_nm_packs_what_one_would_by_hand():
    values, places = pack_nm(torch.tensor([[0.0, 5, 0, 7], [1, 0, 0, 0]]), NM(2, 4))
    assert values.tolist() == [[5, 7], [1, 0]]
    assert places.tolist() == [0b01110001]


def test_what_is_not_nm_is_refused():
    with pytest.raises(ValueError, match="1 of 2 groups keep more than 1 of 4 weights"):
        pack_nm(torch.tensor([[0.0, 5, 0, 7, 0, 0, 0, 1]]), NM(1, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_round_trips(dtype):
    keep = torch.rand(5, 13) > 0.6
    weight = (torch.randint(-50, 50, (5, 13)) * keep).to(dtype)
    values, mask = pack_kept(weight, keep)
    assert (values.numel(), mask.numel()) == (int(keep.sum()), math.ceil(5 * 13 / 8))
    assert torch.equal(unpack_kept(values, mask, (5, 13)), weight)
    with pytest.raises(ValueError, match="1 weights that the mask removes are not zero"):
        pack_kept(torch.ones(1, 2), torch.tensor([[True, False]]))


CASES = {
    "nm": (Wanda(NM(2, 4)), None),
    "1:4": (Magnitude(NM(1, 4)), None),
    "any": (Wanda(Unstructured(0.6)), None),
    "nm, int4": (SparseGPTQ(NM(2, 4), Grid(4, 16)), Grid(4, 16)),
    "any, int8": (GPTQ(Wanda(Unstructured(0.5)), Grid(8, None)), Grid(8, None)),
    "dense, int3": (GPTQ(grid=Grid(3, 16)), Grid(3, 16)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama, as many values, biases, tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_come_back_bit_for_bit_in_the_bytes_that_arithmetic_says(case, family, dtype, tmp_path):
    pruner, grid = CASES[case]
    model = model_of(family).to(dtype)
    report = prune_sequentially(model, BATCHES, pruner, progress=False)
    found = save_compressed(
        model, report.masks, tmp_path / "out", pattern=pruner.pattern, scales=report.scales, grid=grid
    )
    loaded = load_compressed(tmp_path / "out")
    assert loaded.dtype == dtype
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    if dtype == torch.float32:  # model.bfloat16() also rounds the rotary frequencies, which are in no file
        assert torch.equal(loaded(BATCHES[0]).logits, model(BATCHES[0]).logits)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings

    values = indices = scales = weights = dense = 0
    for name, keep in report.masks.items():
        bits = grid.bits if grid else 8 * dtype.itemsize
        weights, dense = weights + keep.numel(), dense + keep.numel() * dtype.itemsize
        if isinstance(pruner.pattern, NM):
            kept = keep.numel() * pruner.pattern.n // pruner.pattern.m
            indices += math.ceil(2 * kept / 8)
        else:
            kept = int(keep.sum())
            indices += math.ceil(keep.numel() / 8)
        values += math.ceil(kept * bits / 8)
        if grid:
            out, size = keep.T.shape if name in report.input_first else keep.shape
            scales += 2 * out * grid.groups(size)
    assert (found.value_bytes, found.index_bytes, found.scale_bytes) == (values, indices, scales)
    assert (found.packed_weights, found.dense_bytes) == (weights, dense)
    assert found.effective_bits == pytest.approx(8 * (values + indices + scales) / weights)
    assert found == measure_compression(tmp_path / "out")
    assert found.file_bytes == (tmp_path / "out" / "compressed.safetensors").stat().st_size
    assert found.file_bytes == values + indices + scales + found.other_bytes + found.header_bytes
    rest = sum(t.nbytes for n, t in dict(model.named_parameters()).items() if n not in report.masks)
    assert found.other_bytes == rest


def test_packed_two_of_four_in_16_bits_takes_at_most_0_57(tmp_path):
    model = model_of("llama").half()
    report = prune_sequentially(model, BATCHES, Magnitude(NM(2, 4)), progress=False)
    found = save_compressed(model, report.masks, tmp_path / "out", pattern=NM(2, 4))
    assert found.ratio == 0.5625
    without = save_compressed(model, report.masks, tmp_path / "bits")  # a mask of one bit a weight
    assert without.ratio == 0.5 + 1 / 16


def test_layers_of_another_pattern_are_packed_by_their_masks(tmp_path):
    model = model_of("llama")
    first = prune_sequentially(model, BATCHES, Wanda(NM(2, 4)), targets="*.mlp.*", progress=False)
    second = prune_sequentially(model, BATCHES, Wanda(Unstructured(0.5)), targets="*.self_attn.*", progress=False)
    found = save_compressed(model, MaskSet.join([first.masks, second.masks]), tmp_path / "out", pattern=NM(2, 4))
    assert found.index_bytes == sum(keep.numel() // 8 for keep in [*first.masks.values(), *second.masks.values()])
    assert torch.equal(load_compressed(tmp_path / "out")(BATCHES[0]).logits, model(BATCHES[0]).logits)


def test_dtypes_and_how_to_generate_come_back(tmp_path):
    model = model_of("llama").bfloat16()
    model.model.norm.float()
    model.generation_config.do_sample = True
    model.generation_config.temperature, model.generation_config.eos_token_id = 0.3, [5, 6]
    report = prune_sequentially(model.float(), BATCHES, Magnitude(NM(2, 4)), progress=False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.bfloat16)
    save_compressed(model, report.masks, tmp_path / "out")
    loaded = load_compressed(tmp_path / "out")
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert loaded.generation_config.temperature == 0.3
    assert loaded.generation_config.eos_token_id == [5, 6]


def test_weights_tied_by_hand_are_in_the_file(tmp_path):
    model = model_of("llama")
    model.lm_head.weight = model.model.embed_tokens.weight  # which the configuration does not know
    report = prune_sequentially(model, BATCHES, Magnitude(NM(2, 4)), progress=False)
    save_compressed(model, report.masks, tmp_path / "out")
    assert torch.equal(load_compressed(tmp_path / "out")(BATCHES[0]).logits, model(BATCHES[0]).logits)


def test_structured_masks_pack_too(tmp_path):
    model = model_of("llama")
    report = prune_sequentially(model, BATCHES, Structured(Columns(0.25)), progress=False)
    save_compressed(model, report.masks, tmp_path / "out")
    assert torch.equal(load_compressed(tmp_path / "out")(BATCHES[0]).logits, model(BATCHES[0]).logits)


def test_what_does_not_belong_into_the_file_is_refused_and_the_old_one_stays(tmp_path, unchecked):
    model = model_of("llama")
    report = prune_sequentially(model, BATCHES, SparseGPTQ(NM(2, 4), Grid(4, 16)), progress=False)
    out, packing = tmp_path / "out", {"scales": report.scales, "grid": Grid(4, 16)}
    save_compressed(model, report.masks, out, pattern=NM(2, 4), **packing)
    before = (out / "compressed.safetensors").read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"mine holds other files, first notes.txt; choose a folder of its own"):
        save_compressed(model, report.masks, tmp_path / "mine", pattern=NM(2, 4), **packing)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep me"
    (out / "notes.txt").write_text("keep me too")
    save_compressed(model, report.masks, out, pattern=NM(2, 4), **packing)
    assert (out / "notes.txt").read_text() == "keep me too"
    with pytest.raises(ValueError, match=r"Grid\(bits=4, group_size=16\) without scales"):
        save_compressed(model, report.masks, out, grid=Grid(4, 16))
    with pytest.raises(ValueError, match=r"scales of shape \(48, 3\) for weights of shape \(48, 48\): .* has 6 a row"):
        save_compressed(model, report.masks, out, scales=report.scales, grid=Grid(4, 8))
    with pytest.raises(ValueError, match=r"rounded to another grid than Grid\(bits=3"):
        save_compressed(model, report.masks, out, scales=report.scales, grid=Grid(3, 16))
    with pytest.raises(ValueError, match="scales need the grid"):
        save_compressed(model, report.masks, out, scales=report.scales)
    with pytest.raises(ValueError, match="these masks belong to another model: 1 of 1 do not fit, first a.weight"):
        save_compressed(model, MaskSet({"a.weight": torch.ones(2, 2).bool()}), out)
    model.get_parameter(name).data[0] += 1e-3
    with pytest.raises(ValueError, match=rf"layer {name}: .*Quantize last"):
        save_compressed(model, report.masks, out, pattern=NM(2, 4), **packing)
    with pytest.raises(ValueError, match=rf"layer {name}: .*weights that the mask removes are not zero"):
        save_compressed(model, report.masks, out)
    assert (out / "compressed.safetensors").read_bytes() == before


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"compressed.safetensors is missing; save_compressed writes it"):
        load_compressed(tmp_path)
    path = tmp_path / "compressed.safetensors"
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        measure_compression(tmp_path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not one that save_compressed wrote"):
        load_compressed(tmp_path)


def test_folders_inside_an_earlier_compressed_model_are_replaced(tmp_path):
    """As tokenizers with several chat templates have them."""
    for text in ("old", "new"):
        with filled_folder(tmp_path / "small") as partial:
            (partial / "additional_chat_templates").mkdir()
            (partial / "additional_chat_templates" / f"{text}.jinja").write_text(text)
    assert [file.name for file in (tmp_path / "small/additional_chat_templates").iterdir()] == ["new.jinja"]
    assert not (tmp_path / "small.partial").exists()
