"""Mixtures of experts: every expert is pruned by the tokens that are routed to it, as an independent reference says."""

import copy
import json
import warnings

import families
import oracles
import pytest
import torch
import transformers as hf
from fits import optimizer, trainer_of
from launch import HERE, together
from test_enforcer import Watch
from torch import nn

from prune_callbacks import (
    MRP,
    NM,
    OWL,
    CausalLM,
    Columns,
    IMPSchedule,
    IterativePrune,
    LagrangianAllocation,
    LoRARecovery,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    PruneReport,
    RunReport,
    SparseGPT,
    SparsityBenchmark,
    Structured,
    TokenDataModule,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.experts import routers
from prune_callbacks.anatomy.targets import find_targets, parameters_of
from prune_callbacks.calibration.products import WeightUses
from prune_callbacks.deploy import load_compressed, save_compressed
from prune_callbacks.deploy.conversion import find_two_four
from prune_callbacks.deploy.csr import convert_to_csr_
from prune_callbacks.reporting.drawing import layer_grid
from prune_callbacks.reporting.page import mask_pictures
from prune_callbacks.tasks import PythonDocs

PRUNERS = {
    "magnitude": Magnitude(NM(2, 4)),
    "wanda": Wanda(Unstructured(0.5)),
    "wanda-1:4": Wanda(NM(1, 4)),
    "sparsegpt": SparseGPT(NM(2, 4)),
    "mrp": MRP(Unstructured(0.5)),
}


BATCHED = {"experts_implementation": "batched_mm"}  # the default one knows no float64


def model_of(family, seed=1):
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(families.MIXTURES[family](), **BATCHED).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.ndim == 3:  # experts that differ, and routers that choose
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        model.get_input_embeddings().weight.normal_()
        for module in model.modules():
            if hasattr(module, "top_k") and hasattr(module, "weight"):
                module.weight.copy_(torch.randn_like(module.weight))
    return model


@pytest.fixture
def batches():
    return list(torch.randint(3, 61, (12, 12)).split(4))


def pruned(model, batches, pruner, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*routers stay dense")
        return prune_sequentially(model, batches, pruner, progress=False, **settings)


def owners_in(model, block):
    """Modules with experts in a block."""
    return {n: m for n, m in model.get_submodule(block).named_modules() if getattr(m, "down_proj", None) is not None}


def prune_experts_by_rerunning(model, blocks, batches, pruner, min_tokens):
    """As `families.prune_by_rerunning`, with each expert's tokens from what the router told the experts."""
    for block in blocks:
        names = [f"{block}.{n}" for n, m in owners_in(model, block).items() if isinstance(m.down_proj, nn.Parameter)]
        seen = {name: oracles.expert_inputs(model, name, batches) for name in names}
        deciding = [n for n in families.layers_in(model, block) if n.endswith("shared_expert_gate")]
        layers = [n for n in families.layers_in(model, block) if n not in deciding]
        inputs = oracles.layer_inputs(model, layers, batches)
        kept = (
            torch.cat([b["attention_mask"].flatten().bool() for b in batches]) if isinstance(batches[0], dict) else None
        )
        for name in layers:
            solve(
                families.matrix(model.get_submodule(name)), inputs[name] if kept is None else inputs[name][kept], pruner
            )
        for name in names:
            owner = model.get_submodule(name)
            for attribute in ("gate_up_proj", "down_proj"):
                for expert, x in enumerate(seen[name][attribute]):
                    stored = owner.get_parameter(attribute).data[expert]
                    weight = stored.T if owner.is_transposed else stored
                    solve(weight, x, pruner if len(x) >= min_tokens else Magnitude(pruner.pattern))


def solve(weight, x, pruner):
    statistic = pruner.statistic(weight.shape[1])
    if statistic is not None:
        statistic.update(x)
    weight.copy_(pruner.prune(weight, statistic).weight)


def assert_equal_to_rerunning(model, batches, pruner, min_tokens=1):
    reference, dense = copy.deepcopy(model), copy.deepcopy(model)
    report = pruned(model, batches, pruner, min_expert_tokens=min_tokens)
    prune_experts_by_rerunning(reference, [n for n, _ in find_blocks(model)], batches, pruner, min_tokens)
    assert list(model.state_dict()) == list(dense.state_dict())
    for name, parameter in model.named_parameters():
        if name in report.masks:
            expected = reference.get_parameter(name)
            torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            assert not torch.equal(parameter, dense.get_parameter(name))
            assert torch.equal(report.masks[name], expected != 0)
        else:
            assert torch.equal(parameter, dense.get_parameter(name)), name
            assert torch.equal(reference.get_parameter(name), dense.get_parameter(name)), name
    report.masks.check(pruner.pattern, input_first=report.input_first)
    assert report.masks.violations(model.named_parameters()) == {}
    return report


@pytest.mark.parametrize("family", families.MIXTURES)
@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
def test_pruning_equals_rerunning_the_whole_model(family, pruner, batches):
    model = model_of(family)
    chosen = model.config._experts_implementation
    report = assert_equal_to_rerunning(model, batches, pruner)
    assert model.config._experts_implementation == chosen
    assert report.by_magnitude == {}
    fused = [name for name, p in model.named_parameters() if p.ndim == 3]
    assert [name for name in report.masks if len(report.masks.shape(name)) == 3] == fused
    assert len(fused) in (2, 4)
    layers = [layer.name for layer in report.layers]
    for name in fused:
        assert {f"{name}.{expert}" for expert in range(4)} <= set(layers)
    first = next(layer for layer in report.layers if layer.name.endswith("gate_up_proj.0"))
    assert first.shape[1] == 16
    assert all("gate" in name or "router" in name for name in report.skipped)
    assert len(report.skipped) == len(fused) // 2 * (2 if family == "qwen2-moe" else 1)


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_padding_is_routed_and_does_not_count(family, batches):
    model = model_of(family)
    masks = [(torch.arange(12) < length[:, None]).long() for length in torch.randint(3, 13, (3, 4))]
    padded = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(batches, masks, strict=True)]
    assert_equal_to_rerunning(model, padded, SparseGPT(NM(2, 4)))
    without = model_of(family)
    pruned(without, batches, SparseGPT(NM(2, 4)))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), without.parameters(), strict=True))


def unreachable(model, expert):
    for module in model.modules():
        if getattr(module, "bias", None) is not None and hasattr(module, "top_k"):
            module.bias.data[expert] = -1e4
    return model


def test_experts_that_few_tokens_reach_are_left_to_magnitude_and_named(batches):
    model = unreachable(model_of("gpt-oss"), 3)
    with pytest.warns(UserWarning, match=r"layers.0.mlp.experts.gate_up_proj: too few .* 3 \(0 tokens\).*by Magnitude"):
        report = assert_equal_to_rerunning(model, batches, Wanda(NM(2, 4)))
    assert report.by_magnitude == {
        f"model.layers.{i}.mlp.experts.{kind}_proj.3": 0 for i in (0, 1) for kind in ("gate_up", "down")
    }
    assert PruneReport.from_state_dict(report.state_dict()).by_magnitude == report.by_magnitude
    counts = oracles.expert_inputs(model_of("gpt-oss"), "model.layers.0.mlp.experts", batches)["down_proj"]
    most = max(len(x) for x in counts)
    report = assert_equal_to_rerunning(model_of("gpt-oss"), batches, SparseGPT(NM(2, 4)), min_tokens=most)
    few = {n: t for n, t in report.by_magnitude.items() if n.startswith("model.layers.0.mlp.experts.down_proj")}
    assert few == {f"model.layers.0.mlp.experts.down_proj.{e}": len(x) for e, x in enumerate(counts) if len(x) < most}


@pytest.mark.parametrize("pruner", [SparseGPT(Unstructured(0.47)), SparseGPT(NM(2, 4))], ids=str)
def test_with_an_allocation_experts_that_no_token_reaches_have_the_mean_share(batches, pruner):
    exact = isinstance(pruner.pattern, Unstructured)
    for allocation in (OWL(threshold=2.0), LagrangianAllocation())[0 if exact else 1 :]:
        report = pruned(unreachable(model_of("gpt-oss"), 3), batches, pruner, allocation=allocation)
        assert set(report.by_magnitude.values()) == {0}
        alone = {layer.name: layer.sparsity for layer in report.layers if layer.name in report.by_magnitude}
        assert len(alone) == 4
        assert all(abs(sparsity - pruner.pattern.sparsity) < (2e-3 if exact else 1e-9) for sparsity in alone.values())
        assert len({round(layer.sparsity, 2) for layer in report.layers}) > 1
        sizes = {name: mask.numel() for name, mask in report.masks.items()}
        removed = sum(int((~mask).sum()) for mask in report.masks.values())
        if exact:
            assert removed == round(0.47 * sum(sizes.values()))
        else:
            assert removed >= 0.5 * sum(sizes.values())


def test_with_an_allocation_experts_of_which_nothing_is_seen_are_an_error(batches):
    model = model_of("mixtral")
    owner = model.model.layers[1].mlp.experts
    owner.forward = lambda *args: type(owner).forward(copy.deepcopy(owner), *args)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj.0: no product with it was seen .* `targets`"):
        pruned(model, batches, Wanda(Unstructured(0.5)), allocation=OWL())


def test_targets_choose_experts(batches):
    dense = model_of("mixtral")
    for targets, chosen in (
        ("down_proj", {(i, e, "down_proj") for i in (0, 1) for e in range(4)}),
        ("model.layers.1.*.experts.*.2", {(1, 2, "down_proj"), (1, 2, "gate_up_proj")}),
        ("*.experts.gate_up_proj", {(i, e, "gate_up_proj") for i in (0, 1) for e in range(4)}),
    ):
        model = copy.deepcopy(dense)
        report = pruned(model, batches, Wanda(NM(2, 4)), targets=targets)
        assert {layer.name for layer in report.layers} == {
            f"model.layers.{i}.mlp.experts.{k}.{e}" for i, e, k in chosen
        }
        assert report.skipped == {}
        for name, parameter in model.named_parameters():
            for expert in range(4 if parameter.ndim == 3 else 0):
                same = torch.equal(parameter[expert], dense.get_parameter(name)[expert])
                assert same == (f"{name}.{expert}" not in {layer.name for layer in report.layers})
        report.masks.check(NM(2, 4))
    with pytest.raises(ValueError, match=r"'w1' matches no layer. The first .*q_proj, .*experts.gate_up_proj.\*, "):
        pruned(model, batches, Wanda(NM(2, 4)), targets="w1")
    with pytest.raises(ValueError, match=r"layer model.layers.0.mlp.experts.gate_up_proj.0: NM\(2, 5\) needs an input"):
        pruned(model, batches, Wanda(NM(2, 5)), targets="gate_up_proj")


def test_masks_of_experts(tmp_path, batches):
    model = model_of("gpt-oss")
    report = pruned(model, batches, Wanda(NM(1, 4)))
    masks, name = report.masks, "model.layers.1.mlp.experts.down_proj"
    assert masks.shape(name) == (4, 32, 16)
    assert masks.sparsity() == masks.layer_sparsity()[name] == 0.75
    assert name in report.input_first
    with pytest.raises(
        ValueError, match=r"4 of 12 masks do not have NM\(n=1, m=4\): model.layers.0.mlp.experts.gate_up"
    ):
        masks.check(NM(1, 4))
    with pytest.raises(ValueError, match=r"do not have NM\(n=1, m=8\)"):
        masks.check(NM(1, 8), input_first=report.input_first)
    masks.save(tmp_path / "masks.safetensors")
    assert MaskSet.load(tmp_path / "masks.safetensors") == masks
    assert (tmp_path / "masks.safetensors").stat().st_size < masks[name].numel() * 12  # packed, header and all
    fused = parameters_of(find_targets(find_blocks(model), every_kind=True).values())
    assert MaskSet.from_nonzero(fused) == masks
    model.get_parameter(name).data[2, 5] = 1.0
    assert masks.violations(model.named_parameters()) == {name: int((~masks[name])[2, 5].sum())}
    masks.apply_(model.named_parameters())
    assert masks.violations(model.named_parameters()) == {}


@pytest.mark.parametrize("family", families.MIXTURES)
def test_a_pruned_model_is_saved_and_loaded_by_transformers(family, batches, tmp_path):
    model = model_of(family)
    report = pruned(model, batches, Wanda(NM(1, 4)))
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **BATCHED).eval()
    assert report.masks.violations(again.named_parameters()) == {}
    with torch.no_grad():
        assert torch.equal(again(batches[0]).logits, model(batches[0]).logits)


def fit(callbacks, tmp_path, family="mixtral"):
    module = CausalLM(model_of(family).float(), optimizer)
    loader = torch.utils.data.DataLoader(torch.randint(3, 61, (40, 12)), batch_size=2)
    trainer_of(callbacks, tmp_path, max_steps=10).fit(module, loader)
    return module


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_zeros_of_experts_stay_zero_through_every_step(tmp_path, batches, family):
    watch, one_shot = Watch(), OneShotPrune(SparseGPT(NM(2, 4)), batches, progress=False)
    module = fit([one_shot, MaskEnforcer(), watch], tmp_path, family)
    assert watch.steps == 10
    assert watch.worst_weight == watch.worst_moment == 0.0
    assert one_shot.report.masks.violations(module.named_parameters()) == {}
    fused = [name for name in one_shot.report.masks if ".experts." in name]
    assert len(fused) == 4
    # From the zeros alone, as of a model that was loaded:
    enforcer, watch = MaskEnforcer(), Watch(one_shot.report.masks)
    trainer_of([enforcer, watch], tmp_path, max_steps=3).fit(
        module, torch.utils.data.DataLoader(torch.randint(3, 61, (40, 12)), batch_size=2)
    )
    assert enforcer.masks == one_shot.report.masks
    assert watch.worst_weight == 0.0


def test_control_without_the_enforcer_the_zeros_of_experts_come_back(tmp_path, batches):
    one_shot = OneShotPrune(SparseGPT(NM(2, 4)), batches, progress=False)
    module = fit([one_shot, watch := Watch()], tmp_path)
    assert watch.worst_weight > 1e-3
    broken = one_shot.report.masks.violations(module.named_parameters())
    assert all(broken[name] > 0.5 * (~one_shot.report.masks[name]).sum() for name in broken if ".experts." in name)
    assert sum(".experts." in name for name in broken) == 4


@pytest.mark.parametrize("pruner", [Magnitude(Unstructured(0.75)), Magnitude(Columns(0.75))], ids=["global", "layer"])
def test_experts_are_pruned_round_by_round(tmp_path, pruner):
    scope = "global" if isinstance(pruner.pattern, Unstructured) else "layer"
    prune = IterativePrune(IMPSchedule(0.75, rounds=2, every=3), pruner=pruner, scope=scope)
    module = fit([prune, MaskEnforcer()], tmp_path, "gpt-oss")
    assert prune.masks.sparsity() == pytest.approx(0.75)
    assert prune.masks.violations(module.named_parameters()) == {}
    name = "model.model.layers.0.mlp.experts.gate_up_proj"
    keep = next(prune.masks[n] for n in prune.masks if name.endswith(n))
    if scope == "layer":  # (experts, in, out): of every expert a quarter of the input features
        assert keep.all(2).sum(1).tolist() == [4] * 4
        assert keep.any(2).sum(1).tolist() == [4] * 4
        prune.masks.check(Columns(0.75), input_first=[n for n in prune.masks if ".experts." in n])
    with pytest.raises(
        ValueError, match=r"prunes all experts of .*gate_up_proj or none, and the targets choose 1 of 4"
    ):
        fit([IterativePrune(prune.schedule, targets="*.gate_up_proj.2"), MaskEnforcer()], tmp_path)


def test_what_cannot_be_pruned_is_named(batches):
    model = model_of("mixtral")
    with pytest.warns(UserWarning, match=r"2 routers stay dense, first model.layers.0.mlp.gate: it is a router"):
        prune_sequentially(model, batches, Wanda(NM(2, 4)), progress=False)
    with pytest.warns(UserWarning, match=r"4 tensors stay dense, first .*gate_up_proj: .* which this pruner does not"):
        report = prune_sequentially(model, batches, Structured(Columns(0.25)), progress=False)
    assert "model.layers.1.mlp.experts.down_proj" in report.skipped
    model.config._experts_implementation = "eager"
    for owner in owners_in(model, "model.layers.1").values():
        del owner.is_transposed  # as of experts that transformers' interface does not know
    with pytest.warns(UserWarning, match=r"2 tensors stay dense, first model.layers.1.*does not say which dimension"):
        prune_sequentially(model, batches, Wanda(NM(2, 4)), progress=False)


def direct(family):
    """Families that MIXTURES has not, since their experts or routers are of another build."""
    small = families.EXPERTS | {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 8}
    if family == "gemma4":
        per_layer = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 4}
        config = hf.Gemma4TextConfig(**small, enable_moe_block=True, top_k_experts=2, global_head_dim=4, **per_layer)
    else:
        config = hf.Llama4TextConfig(**small | {"num_experts_per_tok": 1, "intermediate_size_mlp": 32})
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 3:
                parameter.normal_(0, 0.1)
    return model


def test_a_router_beside_a_norm_is_one_and_a_layer_with_as_many_outputs_as_experts_is_not(batches):
    report = pruned(direct("gemma4"), batches, Wanda(Unstructured(0.5)), min_expert_tokens=1)
    routers = [f"model.layers.{i}.router.proj" for i in (0, 1)]
    assert list(report.skipped) == [*routers, "model.per_layer_model_projection"]  # outside of the blocks
    assert report.masks["model.layers.0.per_layer_input_gate.weight"].shape == (4, 16)


def test_a_router_that_stands_in_the_block_itself():
    block = nn.Module()
    block.experts = nn.Module()
    block.experts.up = nn.Parameter(torch.randn(4, 8, 16))
    block.router = nn.Linear(16, 4)
    block.down_proj = nn.Linear(8, 16)
    assert list(routers(block)) == ["router"]


@pytest.mark.parametrize("sparse", [True, False])
def test_zeros_of_routers_and_of_experts_of_an_unknown_kind_are_held_too(tmp_path, sparse):
    model, zeros = direct("llama4"), {}
    for name, parameter in model.named_parameters():
        if (sparse and (parameter.ndim == 3 or "router" in name)) or "q_proj" in name:
            parameter.data[torch.rand_like(parameter) < 0.5] = 0
            zeros[name] = parameter.data == 0
    module, enforcer = CausalLM(model, optimizer), MaskEnforcer()
    loader = torch.utils.data.DataLoader(torch.randint(3, 61, (12, 12)), batch_size=2)
    trainer_of([enforcer], tmp_path, max_steps=3).fit(module, loader)
    assert all(torch.equal(~enforcer.masks[name], where) for name, where in zeros.items())
    assert all(not model.get_parameter(name)[where].any() for name, where in zeros.items())
    assert any("router" in name or "experts" in name for name in enforcer.masks) == sparse


def test_rounds_name_what_they_leave_dense_in_mixtures(tmp_path):
    loader = torch.utils.data.DataLoader(torch.randint(3, 61, (12, 12)), batch_size=2)
    prune = IterativePrune(IMPSchedule(0.5, rounds=1, every=1))
    with pytest.warns(UserWarning, match="stay dense") as seen:
        trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=2).fit(CausalLM(direct("llama4"), optimizer), loader)
    told = [str(w.message) for w in seen if "stay dense" in str(w.message)]
    assert len(told) == 2
    assert "4 tensors stay dense, first model.layers.0.feed_forward.experts.gate_up_proj: it holds the" in told[0]
    assert "2 routers stay dense, first model.layers.0.feed_forward.router" in told[1]


def test_a_product_with_a_vector_is_let_through():
    layer, seen = nn.Linear(4, 3), []
    x = torch.randn(2, 4)
    with WeightUses({"layer": layer.weight.detach()}, lambda name, x: seen.append((name, x))):
        assert torch.equal(nn.functional.linear(x, layer.weight[0]), x @ layer.weight[0])
        nn.functional.linear(x, layer.weight)
    assert [(name, rows is x) for name, rows in seen] == [("layer", True)]


def test_experts_whose_products_are_not_seen_stay_dense_and_are_named(batches):
    model = model_of("mixtral")
    owner = model.model.layers[1].mlp.experts

    def copied(hidden, index, scores):
        hidden_weights = copy.deepcopy(owner)
        return type(owner).forward(hidden_weights, hidden, index, scores)

    owner.forward = copied
    before = owner.down_proj.clone()
    with pytest.warns(
        UserWarning, match=r"layers.1.mlp.experts.gate_up_proj.0 stays dense: no product with it was seen"
    ):
        report = pruned(model, batches, Wanda(NM(2, 4)))
    assert owner.forward is copied
    assert torch.equal(owner.down_proj, before)
    assert len([n for n in report.skipped if n.startswith("model.layers.1.mlp.experts.")]) == 8
    assert "model.layers.1.mlp.experts.down_proj" not in report.masks


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_pruned_experts_are_packed_and_come_back_bit_for_bit(family, batches, tmp_path):
    model = model_of(family).float()
    report = pruned(model, batches, Wanda(NM(2, 4)))
    found = save_compressed(model, report.masks, tmp_path / "out", pattern=NM(2, 4))
    # Kept values of half the size, and 3 bits of places for every two of them where 2:4 is packed as such, or 4.
    assert 0.5 < found.ratio < 0.57
    again = load_compressed(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_lora_leaves_experts_as_they_were_pruned(batches, tmp_path):
    pytest.importorskip("peft")
    one_shot = OneShotPrune(Wanda(NM(2, 4)), batches, progress=False)
    with pytest.warns(
        UserWarning, match=r"4 tensors of experts, first model.layers.0.mlp.experts.gate_up_proj, get no"
    ):
        module = fit([one_shot, LoRARecovery()], tmp_path)
    fresh = model_of("mixtral").float()
    prune_sequentially(fresh, batches, Wanda(NM(2, 4)), progress=False)
    assert one_shot.report.masks.violations(module.model.named_parameters()) == {}
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(module.model.get_parameter(name), fresh.get_parameter(name))
    assert not torch.equal(
        module.model.model.layers[1].self_attn.q_proj.weight, fresh.model.layers[1].self_attn.q_proj.weight
    )


def test_lora_says_so_where_the_model_was_pruned_before_and_where_only_experts_were(batches, tmp_path):
    pytest.importorskip("peft")
    model = model_of("mixtral").float()
    pruned(model, batches, Wanda(NM(2, 4)))
    loader = torch.utils.data.DataLoader(torch.randint(3, 61, (4, 12)), batch_size=2)
    with pytest.warns(UserWarning, match=r"4 tensors of experts, first .*experts.gate_up_proj, get no LoRA layers"):
        trainer_of([LoRARecovery()], tmp_path, max_steps=1).fit(CausalLM(model, optimizer), loader)
    only = r"only experts are pruned, 4 tensors, first .*experts.gate_up_proj.* MaskEnforcer"
    one_shot = OneShotPrune(Wanda(NM(2, 4)), batches, targets="*.experts.*", progress=False)
    with pytest.raises(ValueError, match=only):
        fit([one_shot, LoRARecovery()], tmp_path)
    with pytest.raises(ValueError, match=only):
        trainer_of([LoRARecovery()], tmp_path, max_steps=1).fit(CausalLM(sparse_in_experts(batches), optimizer), loader)


def sparse_in_experts(batches):
    """Of which only the experts are pruned."""
    model = model_of("mixtral").float()
    pruned(model, batches, Wanda(NM(2, 4)), targets="*.experts.*")
    return model


def test_what_takes_linear_layers_only_names_sparse_experts(batches):
    model = model_of("mixtral").float()
    pruned(model, batches, Wanda(NM(2, 4)))
    experts = [name for name, p in model.named_parameters() if p.ndim == 3]
    found = find_two_four(model, None, None)
    assert [name for name in found.skipped if "experts" in name] == experts
    assert "2:4 kernels take linear layers only" in found.skipped[experts[0]]
    assert not find_two_four(model, "q_proj", None).skipped
    _, record = SparsityBenchmark().variants(model, torch.device("cpu"))
    assert any(name.startswith(f"{experts[0]} and 3 more") for name in record["left_out"])
    assert [name for name in record["csr"]["skipped"] if "experts" in name] == experts
    report = convert_to_csr_(model)
    assert list(report.skipped) == experts
    assert "CSR takes linear layers only" in report.skipped[experts[0]]


def test_a_fit_reports_its_experts(tokenizer, tmp_path):
    config = families.MIXTURES["gpt-oss"]()
    config.vocab_size = len(tokenizer)
    corpora = [PythonDocs(part) for part in ("train", "calibration", "evaluation")]
    data = TokenDataModule(
        tokenizer, *corpora, seq_len=16, train_windows=8, calibration_windows=2, evaluation_windows=2
    )
    one_shot = OneShotPrune(SparseGPT(NM(2, 4)), min_expert_tokens=1000, progress=False)
    callbacks = [RunReport(tmp_path / "run", progress=False), one_shot, MaskEnforcer()]
    module = CausalLM(hf.AutoModelForCausalLM.from_config(config), optimizer)
    trainer_of(callbacks, tmp_path, max_steps=3).fit(module, datamodule=data)
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    assert record["by_magnitude"] == one_shot.report.by_magnitude
    assert len(record["by_magnitude"]) == 2 * 2 * 4
    assert max(record["by_magnitude"].values()) > 0
    assert record["sparsity"]["layers"]["model.layers.0.mlp.experts.down_proj"] == 0.5
    assert record["sparsity"]["achieved"] == 0.5
    assert record["violations"] == {}
    assert "experts" in (tmp_path / "run" / "report.html").read_text()
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert MaskSet.load(tmp_path / "run" / "masks.safetensors").violations(again.named_parameters()) == {}


def test_packed_experts_are_refused(batches):
    model = model_of("gpt-oss")
    owner = model.model.layers[0].mlp.experts
    blocks = torch.zeros(4, 64, 1, 16, dtype=torch.uint8)
    del owner.down_proj
    owner.down_proj_blocks = nn.Parameter(blocks, requires_grad=False)
    with pytest.raises(
        ValueError, match=r"experts.down_proj_blocks holds experts packed in torch.uint8, .*dequantized"
    ):
        pruned(model, batches, Wanda(NM(2, 4)))
    model = model_of("mixtral")
    owner = model.model.layers[0].mlp.experts
    owner.down_proj = nn.Parameter(owner.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj.0: its weight is torch.float8.*dequantized"):
        pruned(model, batches, Wanda(NM(2, 4)))


def test_experts_that_deal_tokens_otherwise_refuse_padding(batches):
    model = model_of("mixtral")
    owner = model.model.layers[0].mlp.experts
    forward = owner.forward
    model.model.layers[0].mlp.experts.forward = lambda hidden, index, scores, table=None: forward(hidden, index, scores)

    def extra(self, hidden):
        flat = hidden.view(-1, hidden.shape[-1])
        _, scores, index = self.gate(flat)
        return self.experts(flat, index, scores, table=torch.zeros(3)).view_as(hidden)

    model.model.layers[0].mlp.forward = extra.__get__(model.model.layers[0].mlp)
    mask = torch.ones_like(batches[0])
    mask[0, 5:] = 0
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts deals 48 tokens to experts, and has a tensor of shape \(3,"
    ):
        pruned(model, [{"input_ids": batches[0], "attention_mask": mask}], Wanda(NM(2, 4)))
    pruned(model, batches, Wanda(NM(2, 4)))


def test_experts_in_reports_and_pictures(batches):
    report = pruned(model_of("qwen3-moe"), batches, SparseGPT(NM(2, 4)))
    blocks, kinds, grid = layer_grid({layer.name: layer.sparsity for layer in report.layers})
    assert blocks == ["0", "1"]
    assert "gate_up_proj" in kinds
    assert layer_grid(report.masks.layer_sparsity())[1] == kinds
    assert grid.shape == (2, 6)
    picture = next(p for p in mask_pictures(report.masks) if ".experts." in p["name"])
    assert picture["shape"] == (16, 8)
    assert picture["sparsity"] == 0.5


def test_two_ranks_prune_experts_as_one_does(tmp_path):
    together(HERE / "expert_ranks.py", tmp_path)
    (ours, theirs), alone = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), None
    for label in ours:
        alone = ours[label]["alone"]
        assert ours[label]["counts"] == theirs[label]["counts"]
        for name, weight in alone.items():
            assert torch.equal(ours[label]["shared"][name], theirs[label]["shared"][name])
            torch.testing.assert_close(ours[label]["shared"][name], weight, rtol=1e-6, atol=1e-9)
