"""Permuting channels: what N:M keeps never falls, and the model computes what it did."""

import itertools

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_structured import BATCHES, FAMILIES, model_of
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from prune_callbacks import NM, Gram, Unstructured, Wanda, permute_channels_, prune_sequentially
from prune_callbacks.solvers.permutation import channel_permutation, kept_score


def kept_by_sorting(scores, n, m):
    groups = [scores[:, i : i + m].sort(dim=1, descending=True).values[:, :n] for i in range(0, scores.shape[1], m)]
    return float(sum(group.double().sum() for group in groups))


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 6),
    nm=st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)]),
    rows=st.integers(1, 5),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_a_permutation_that_never_keeps_less(groups, nm, rows, tied, seed):
    generator = torch.Generator().manual_seed(seed)
    n, m = nm
    scores = torch.rand(rows, groups * m, generator=generator, dtype=torch.float64)
    if tied:
        scores = (scores * 3).round()
    order = channel_permutation(scores, n, m)
    assert sorted(order.tolist()) == list(range(groups * m))
    assert kept_score(scores, n, m) == pytest.approx(kept_by_sorting(scores, n, m))
    assert kept_by_sorting(scores[:, order], n, m) >= kept_by_sorting(scores, n, m) - 1e-9


def test_it_comes_near_the_best_of_all_ways_to_group():
    """All 35 ways to make two groups of four out of eight columns: most of what can be gained is."""
    possible = gained = 0.0
    for seed in range(20):
        scores = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = max(
            kept_by_sorting(scores[:, [0, *rest, *sorted(set(range(1, 8)) - set(rest))]], 2, 4)
            for rest in itertools.combinations(range(1, 8), 3)
        )
        found = kept_by_sorting(scores[:, channel_permutation(scores, 2, 4)], 2, 4)
        gained, possible = gained + found - kept_score(scores, 2, 4), possible + best - kept_score(scores, 2, 4)
    assert gained >= 0.8 * possible > 0


def test_large_columns_that_meet_are_parted():
    """All of the score can be kept, and the order they are in keeps half of it."""
    scores = torch.zeros(3, 16)
    scores[:, :8] = 1
    assert kept_score(scores, 2, 4) == 12
    assert kept_score(scores[:, channel_permutation(scores, 2, 4)], 2, 4) == 24


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_what_they_did(family):
    model = model_of(family)
    with torch.no_grad():
        before = model(BATCHES[0]).logits
        weights = {name: p.clone() for name, p in model.named_parameters()}
        done = permute_channels_(model, BATCHES, NM(2, 4), progress=False)
        torch.testing.assert_close(model(BATCHES[0]).logits, before, rtol=1e-4, atol=1e-4)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    # The control: weights did move. (Of a head of 8 features the order may have been the best.)
    assert {f"{name}.weight" for name in done if "attn" not in name} <= changed
    assert all(gain.after >= gain.before for gain in done.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, weights[name].flatten().sort().values)
    if family == "llama":
        expected = {f"model.layers.{i}.{n}" for i in range(2) for n in ("mlp.down_proj", "self_attn.o_proj")}
        assert done.keys() == expected
        moved = {
            f"model.layers.{i}.{n}.weight"
            for i in range(2)
            for n in ("mlp.gate_proj", "mlp.up_proj", "self_attn.v_proj")
        }
        assert changed == {f"{name}.weight" for name in expected} | moved


def test_permuting_only_the_reader_changes_the_model():
    """The control of the test above."""
    model = model_of("llama")
    with torch.no_grad():
        before = model(BATCHES[0]).logits
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.copy_(weight[:, torch.randperm(64)])
        assert (model(BATCHES[0]).logits - before).abs().max() > 0.01


def test_wanda_loses_less_behind_it():
    """On the same inputs, layer by layer; and the report says what N:M keeps, by the norms that reach the layers."""
    readers = [f"model.layers.0.{name}" for name in ("mlp.down_proj", "self_attn.o_proj")]
    losses = {}
    for permuted in (False, True):
        model = model_of("llama")
        done = permute_channels_(model, BATCHES, NM(2, 4), progress=False) if permuted else {}
        inputs = oracles.layer_inputs(model, readers, BATCHES)
        for name in readers:
            gram = Gram(inputs[name].shape[1])
            gram.update(inputs[name])
            weight = model.get_submodule(name).weight.detach()
            losses.setdefault(name, []).append(Wanda(NM(2, 4)).prune(weight, gram).loss)
            if permuted:
                scores = (weight.double() * inputs[name].double().norm(dim=0)) ** 2
                share = kept_by_sorting(scores, 2, 4) / float(scores.sum())
                assert done[name].after == pytest.approx(share, rel=1e-3)
    for name in readers:
        assert losses[name][1] < losses[name][0]


def test_outputs_are_compared_in_full_precision_whatever_is_set():
    """Products rounded to bfloat16 differ by half a percent after thirty blocks of a model that was permuted well."""
    model, seen = model_of("llama"), []
    products = torch.backends.mkldnn.matmul
    model.model.layers[-1].register_forward_hook(lambda *_: seen.append(products.fp32_precision))
    torch.set_float32_matmul_precision("medium")
    try:
        set_by_user = products.fp32_precision
        permute_channels_(model, BATCHES, NM(2, 4), progress=False)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen.count("ieee") == 4  # the whole model and the block alone, each before and after
    assert set_by_user in seen  # control: statistics are taken as the user wants


def test_it_fits_into_a_run_before_pruning():
    model = model_of("qwen2")
    permute_channels_(model, BATCHES, NM(1, 4), progress=False)
    report = prune_sequentially(model, BATCHES, Wanda(NM(1, 4)), progress=False)
    report.masks.check(NM(1, 4))


def test_a_block_that_knows_the_order_of_its_channels_is_noticed():
    """Hidden from the search for such parameters; and where all channels are alike no error: the control."""

    class Scaled(torch.nn.SiLU):
        def forward(self, x):
            return super().forward(x) * secret

    for secret in (torch.ones(64), torch.rand(64)):
        model = model_of("llama")
        mlp = model.model.layers[1].mlp
        mlp.act_fn = Scaled()
        if secret.std() == 0:
            permute_channels_(model, BATCHES, NM(2, 4), progress=False)
            continue
        with pytest.raises(ValueError, match=r"layer model.layers.1: permuting changed the output"):
            permute_channels_(model, BATCHES, NM(2, 4), progress=False)


def sharing_values():
    """Two blocks of their own keys and values, and two that read theirs (Gemma 3n)."""
    config = Gemma3nTextConfig(
        vocab_size=200,
        vocab_size_per_layer_input=200,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=[192] * 4,
        num_kv_shared_layers=2,
        laurel_rank=8,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_values_that_other_blocks_read_are_left_in_order(monkeypatch):
    model = sharing_values()
    before = model(BATCHES[0]).logits
    done = permute_channels_(model, BATCHES, NM(2, 4), progress=False)
    assert {name.rsplit(".", 1)[-1] for name in done} == {"down_proj"}
    assert (model(BATCHES[0]).logits - before).abs().max() < 1e-4 * before.abs().max()
    # Control: no block by itself shows what they share; the whole model does.
    monkeypatch.setattr("prune_callbacks.anatomy.coupling._reads_other_values", lambda owner: False)
    with pytest.raises(ValueError, match="permuting changed the output"):
        permute_channels_(sharing_values(), BATCHES, NM(2, 4), progress=False)


def test_bad_input(unchecked):
    model = model_of("llama")
    with pytest.raises(ValueError, match=r"takes an N:M pattern such as NM\(2, 4\), got Unstructured"):
        permute_channels_(model, BATCHES, Unstructured(0.5), progress=False)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj: NM\(4, 16\) needs an input size divisible by 16"):
        permute_channels_(model, BATCHES, NM(4, 16), progress=False)
    with pytest.raises(ValueError, match="there is no calibration batch"):
        permute_channels_(model, [], NM(2, 4), progress=False)
