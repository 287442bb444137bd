"""Coupled layers: who goes, what stays makes up for it, and the model that is smaller in fact."""

import oracles
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from prune_callbacks import NM, Columns, Gram, MaskSet, Structured, Unstructured, Wanda, prune_sequentially, shrink
from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.coupling import find_coupled

OUT, IN = 5, 24
COMMON = {"vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
GROUPED = COMMON | {"num_key_value_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "llama": LlamaConfig(**GROUPED),
    "llama, as many values, biases, tied": LlamaConfig(
        **COMMON, intermediate_size=64, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama, one head of keys and values": LlamaConfig(**COMMON, num_key_value_heads=1, intermediate_size=64),
    "mistral": MistralConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8),
    "opt": OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=48, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=200, n_embd=48, n_layer=2, n_head=6, n_positions=64),
    "gpt-neox": GPTNeoXConfig(**COMMON, intermediate_size=64),
    "falcon": FalconConfig(**COMMON),
    "phi": PhiConfig(**COMMON, intermediate_size=64),
}
BATCHES = list(torch.randint(3, 190, (6, 48), generator=torch.Generator().manual_seed(0)).split(2))


def model_of(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    for parameter in model.parameters():  # biases and norms are zeros and ones at first
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def layer(correlated):
    x = correlated(IN)
    gram = Gram(IN)
    gram.update(x)
    return torch.randn(OUT, IN, dtype=torch.float64), x, gram


@pytest.mark.parametrize(
    ("width", "pools", "share"), [(1, 1, 0.25), (1, 1, 0.6), (4, 1, 0.5), (4, 3, 0.5), (4, 2, 0.3)]
)
def test_the_exact_loss_equals_trying_every_unit_with_a_direct_solve(layer, width, pools, share):
    weight, x, gram = layer
    pruned = Structured(Columns(share)).prune_units(weight, [], gram, width, pools)[0]
    removed = round(share * IN / width / pools)
    units, solved = oracles.greedy_units(weight, x, 0.01, width, pools, removed)
    assert torch.equal(pruned.keep, units.repeat_interleave(width).expand(OUT, -1))
    torch.testing.assert_close(pruned.weight, solved, rtol=1e-7, atol=1e-7)
    assert pruned.loss == pytest.approx(oracles.output_error(weight, solved, x), rel=1e-6)


@pytest.mark.parametrize(("width", "pools"), [(1, 1), (4, 3)])
def test_wanda_scores_and_the_same_compensation(layer, width, pools):
    weight, x, gram = layer
    pruned = Structured(Columns(0.5), score="wanda").prune_units(weight, [], gram, width, pools)[0]
    scores = (weight.abs() * x.norm(dim=0)).sum(0).view(pools, -1, width).sum(-1)
    keep = torch.stack([scores[p] >= scores[p].sort().values[scores.shape[1] // 2] for p in range(pools)])
    columns = keep.flatten().repeat_interleave(width).expand(OUT, -1)
    assert torch.equal(pruned.keep, columns)
    expected = oracles.least_squares(weight, x, 0.01, columns)
    torch.testing.assert_close(pruned.weight, expected, rtol=1e-7, atol=1e-7)


def test_writers_lose_the_rows_that_the_reader_loses_as_columns(layer):
    weight, _, gram = layer
    writers = [torch.randn(IN, 7), torch.randn(IN, 3)]
    reader, *written = Structured(Columns(0.25)).prune_units(weight, writers, gram, width=1, pools=1)
    for dense, pruned in zip(writers, written, strict=True):
        assert torch.equal(pruned.keep[:, 0], reader.keep[0])
        assert torch.equal(pruned.weight, dense * pruned.keep)
        assert pruned.loss is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", ["loss", "wanda"])
def test_shrunk_models_compute_what_the_zeros_did(family, score, tmp_path):
    model = model_of(family)
    dense = sum(p.numel() for p in model.parameters())
    names = list(model.state_dict())
    report = prune_sequentially(model, BATCHES, Structured(Columns(0.25), score), progress=False)
    with torch.no_grad():
        logits = model(BATCHES[0]).logits
    smaller = shrink(model, report.masks)
    assert list(smaller.state_dict()) == names
    removed = sum(int((~report.masks[name]).sum()) for name in report.masks)
    biases = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in smaller.parameters()) - removed
    assert dense == sum(p.numel() for p in model.parameters())  # the given one stays
    assert 0 <= biases < 200
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for other in (smaller, loaded):
            torch.testing.assert_close(other(BATCHES[0]).logits, logits, rtol=1e-4, atol=1e-4)
    prompt = BATCHES[0][:1, :5]
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)


def test_a_shrunk_model_without_the_right_units_is_another(tmp_path):
    """The control: the same number of other channels."""
    model = model_of("llama")
    report = prune_sequentially(model, BATCHES, Structured(Columns(0.25)), targets="*.mlp.*", progress=False)
    right = shrink(model, report.masks)
    wrong = shrink(model, report.masks)
    for a, b in zip(wrong.model.layers, model.model.layers, strict=True):
        a.mlp.up_proj.weight.data = b.mlp.up_proj.weight.data[: len(a.mlp.up_proj.weight)]
    with torch.no_grad():
        logits = model(BATCHES[0]).logits
        torch.testing.assert_close(right(BATCHES[0]).logits, logits, rtol=1e-4, atol=1e-4)
        assert (wrong(BATCHES[0]).logits - logits).abs().max() > 0.01


def test_queries_go_evenly_from_groups_and_keys_and_values_stay():
    model = model_of("llama")
    report = prune_sequentially(model, BATCHES, Structured(Columns(0.3)), progress=False)
    for block in range(2):
        heads = report.masks[f"model.layers.{block}.self_attn.q_proj.weight"].view(2, 3, 8, 48)
        whole = heads.all((2, 3))
        assert torch.equal(whole, heads.any(3).any(2))
        assert whole.sum(1).tolist() == [2, 2]
        assert f"model.layers.{block}.self_attn.k_proj" in report.skipped
        assert f"model.layers.{block}.self_attn.v_proj" in report.skipped
    config = shrink(model, report.masks).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.intermediate_size == 45


def test_the_engine_uses_what_reaches_the_reader_with_the_blocks_before_pruned():
    """The second block's channels, against a run of the whole model whose first block is pruned."""
    model = model_of("llama")
    report = prune_sequentially(model, BATCHES, Structured(Columns(0.25)), targets="model.layers.0.*", progress=False)
    name = "model.layers.1.mlp.down_proj"
    x = oracles.layer_inputs(model, [name], BATCHES)[name]
    gram = Gram(64)
    gram.update(x)
    expected = Structured(Columns(0.25)).prune(model.get_submodule(name).weight.detach(), gram)
    whole = model_of("llama")
    everything = prune_sequentially(whole, BATCHES, Structured(Columns(0.25)), progress=False)
    for first in report.masks:
        assert torch.equal(everything.masks[first], report.masks[first])
    assert torch.equal(everything.masks[f"{name}.weight"], expected.keep)
    torch.testing.assert_close(whole.get_submodule(name).weight, expected.weight, rtol=1e-3, atol=1e-4)
    losses = {layer.name: layer.loss for layer in everything.layers}
    assert losses[f"{name}.weight"] == pytest.approx(expected.loss, rel=1e-3)
    assert losses["model.layers.1.mlp.up_proj.weight"] is None


def test_what_cannot_be_shrunk_is_named(unchecked):
    model = model_of("llama")
    with pytest.raises(ValueError, match=r"no channel and no head is zero as a whole.*Structured\(Columns"):
        shrink(model, MaskSet({}))
    report = prune_sequentially(model, BATCHES, Wanda(Unstructured(0.5)), progress=False)
    with pytest.raises(ValueError, match="nothing can be made smaller"):
        shrink(model, report.masks)
    model = model_of("llama")
    report = prune_sequentially(model, BATCHES, Structured(Columns(0.25)), progress=False)
    model.model.layers[1].mlp.down_proj.weight.data[:] = 1
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj has weights that are not zero in columns"):
        shrink(model, report.masks)
    model = model_of("llama")
    report = prune_sequentially(model, BATCHES, Structured(Columns(0.25)), targets="*.1.mlp.*", progress=False)
    with pytest.raises(ValueError, match=r"different numbers of channels.*layers.0.mlp.down_proj keeps 64"):
        shrink(model, report.masks)


def test_bloom_has_no_number_of_channels_to_set():
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=200, hidden_size=48, n_layer=2, n_head=6)).eval()
    report = prune_sequentially(model, BATCHES, Structured(Columns(0.25)), progress=False)
    with pytest.raises(ValueError, match=r"BloomConfig has none of intermediate_size.*to set"):
        shrink(model, report.masks)


def test_bad_input(unchecked, layer):
    weight, _, gram = layer
    for make, message in (
        (lambda: Structured(NM(2, 4)), r"Structured takes Columns, such as Columns\(0.25\)"),
        (lambda: Structured(Columns(0.25), score="magnitude"), 'score must be "loss" or "wanda"'),
        (lambda: Structured(Columns(0.9)).prune_units(weight, [], gram, 12, 2), "would leave none of 1 units of 12"),
        (lambda: Structured(Columns(0.5)).prune_units(weight, [torch.ones(4, 4)], gram, 1, 1), "a writer of 4 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    model = model_of("llama")
    with pytest.raises(ValueError, match=r"down_proj can lose whole rows and columns only together with .*gate_proj"):
        prune_sequentially(model, BATCHES, Structured(Columns(0.25)), targets="down_proj", progress=False)
    with pytest.raises(ValueError, match="none of the targets is coupled"):
        prune_sequentially(model, BATCHES, Structured(Columns(0.25)), targets="k_proj", progress=False)
    block = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="has no coupled layers of a known kind"):
        find_coupled([("h.0", block)])


def test_numbers_of_heads_that_the_configuration_refuses_are_not_made(tmp_path):
    """Llama's wants the hidden size to be divisible by them: of 8 heads to 64 features 4 go, or none, but not 3."""
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**COMMON | {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 64})
    )
    with pytest.warns(UserWarning, match=r"of 8 heads of 8 .* LlamaForCausalLM cannot have: removing 0 in 2 layers"):
        report = prune_sequentially(model, BATCHES, Structured(Columns(0.4)), progress=False)
    smaller = shrink(model, report.masks)
    assert smaller.config.num_attention_heads == 8
    assert smaller.config.intermediate_size < model.config.intermediate_size
    smaller.save_pretrained(tmp_path)
    keep = torch.arange(64) // 8 < 5
    masks = {"model.layers.0.self_attn.o_proj.weight": keep.expand(64, -1)}
    masks["model.layers.1.self_attn.o_proj.weight"] = keep.expand(64, -1)
    for name in masks:
        model.get_parameter(name).data[:, ~keep] = 0
    with pytest.raises(ValueError, match=r"LlamaConfig does not accept \(5, 5\): The hidden size \(64\) is not"):
        shrink(model, masks)


@pytest.mark.parametrize("config", [Olmo2Config, BitNetConfig])
def test_what_has_numbers_for_every_unit_is_left_alone(config):
    """OLMo 2 normalises over all heads, BitNet over all channels and heads."""
    model = AutoModelForCausalLM.from_config(config(**GROUPED, pad_token_id=0)).eval()
    blocks = find_blocks(model)
    if config is BitNetConfig:
        with pytest.raises(ValueError, match="has no coupled layers of a known kind"):
            find_coupled(blocks)
    else:
        assert {group.reader.rsplit(".", 1)[-1] for group in find_coupled(blocks)} == {"down_proj"}


def test_rounding_to_no_head_is_said():
    model = model_of("llama")
    expected = r"Columns\(sparsity=0.1\) of 3 heads of 8 .* rounds to none: removing 0 in 2 layers, first .*o_proj"
    with pytest.warns(UserWarning, match=expected) as caught:
        report = prune_sequentially(model, BATCHES, Structured(Columns(0.1)), progress=False)
    assert not any("experts" in str(warning.message) for warning in caught)
    assert report.skipped["model.layers.0.self_attn.k_proj"].startswith("its heads stay: several query heads share")
    assert report.masks["model.layers.0.self_attn.o_proj.weight"].all()
    assert shrink(model, report.masks).config.num_attention_heads == 6


def test_coupled_layers_of_families_are_found():
    kinds = {}
    for family in ("llama", "opt", "gpt2", "gpt-neox"):
        groups = find_coupled(find_blocks(model_of(family)))
        kinds[family] = {(group.reader.rsplit(".", 1)[-1], group.width, group.pools) for group in groups}
    assert kinds == {
        "llama": {("down_proj", 1, 1), ("o_proj", 8, 2)},
        "opt": {("fc2", 1, 1)},
        "gpt2": {("c_proj", 1, 1)},
        "gpt-neox": {("dense_4h_to_h", 1, 1)},
    }
