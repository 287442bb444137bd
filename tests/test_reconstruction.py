"""Block reconstruction: what it minimises, what it must not touch, that ranks and files change nothing, bad input."""

import copy
import math
from pathlib import Path

import pytest
import torch
from launch import together
from test_experts import model_of
from torch import nn
from torch.amp import GradScaler

from prune_callbacks import (
    NM,
    BlockReconstruction,
    Magnitude,
    MaskSet,
    SparseGPT,
    SparseGPTQ,
    Unstructured,
    Wanda,
    prune_sequentially,
    reconstruct_,
)
from prune_callbacks.calibration.batches import change_tensors
from prune_callbacks.calibration.capture import hidden_of
from prune_callbacks.calibration.chain import chain_inputs
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.ranks import ALONE
from prune_callbacks.reconstruction.loss import BlockLoss, _real
from prune_callbacks.reconstruction.training import _MaskedAdam
from prune_callbacks.reconstruction.windows import single_windows
from prune_callbacks.tasks import tiny_llama

HERE = Path(__file__).parent
FEW_OF_ANY = BlockReconstruction(held_out=0)
FEW = BlockReconstruction(passes=2, learning_rate=0.005, held_out=0.25)


class Affine(nn.Module):
    """A block of one layer without a nonlinearity, whose best parameters are known in closed form."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x)


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def llama(seed=0):
    return tiny_llama(seed, hidden_size=32, layers=2).eval()


def ids(count=8, tokens=24, seed=0):
    return torch.randint(3, 200, (count, tokens), generator=torch.Generator().manual_seed(seed))


def pruned(model, **settings):
    return prune_sequentially(model, ids().split(1), SparseGPT(NM(2, 4)), progress=False, **settings)


def weighted_least_squares(x, y, weight, keep, token_weights):
    """Row by row: the best kept weights and bias of one layer, in float64, and the loss that they reach."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    best, root = torch.zeros(len(weight), x.shape[1], dtype=torch.float64), token_weights.double().sqrt()[:, None]
    for row in range(len(weight)):
        columns = torch.cat([keep[row], torch.ones(1, dtype=torch.bool)])
        best[row, columns] = torch.linalg.lstsq(root * x[:, columns], root[:, 0] * y[:, row].double()).solution
    return best, ((x @ best.T - y.double()).square().sum(1) * token_weights.double()).mean()


def test_a_block_without_a_nonlinearity_reaches_the_known_optimum():
    torch.manual_seed(0)
    model = Stack(Affine(12))
    dense = copy.deepcopy(model)
    x = torch.randn(40, 8, 12) @ (torch.eye(12) + 0.3 * torch.randn(12, 12))
    x[3] *= 100  # windows with enormous values count as much as any
    y = dense(x).detach().flatten(0, 1)
    setting = BlockReconstruction(passes=150, learning_rate=0.05, batch_size=8, held_out=0)
    report = prune_sequentially(
        model,
        list(x.split(4)),
        Magnitude(Unstructured(0.5)),
        targets="*.layer",
        reconstruction=setting,
        progress=False,
    )
    keep = report.masks["blocks.0.layer.weight"]
    best, loss = weighted_least_squares(
        x.flatten(0, 1),
        y,
        dense.blocks[0].layer.weight,
        keep,
        1 / y.square().sum(1).clamp(min=1e-4 * y.square().sum(1).mean()),
    )
    (block,) = report.reconstruction
    assert block.after == pytest.approx(float(loss), rel=2e-3)
    assert block.before > 1.5 * block.after  # the optimum is not where it began
    torch.testing.assert_close(model.blocks[0].layer.weight.double(), best[:, :-1], atol=0.02, rtol=0.02)
    torch.testing.assert_close(model.blocks[0].layer.bias.double(), best[:, -1], atol=0.05, rtol=0.05)
    assert report.masks.violations(model.named_parameters()) == {}


def test_loss_and_gradients_are_those_of_float64_autograd():
    model, dense = llama(), llama(1)
    tokens = torch.ones(3, 24, dtype=torch.long)
    tokens[1, 15:] = 0  # padding does not count
    batches = [{"input_ids": row[None], "attention_mask": mask[None]} for row, mask in zip(ids(3), tokens, strict=True)]
    blocks, others = list(model.model.layers), list(dense.model.layers)
    inputs, goals = chain_inputs(model, blocks, batches), chain_inputs(dense, others, batches)
    loss = BlockLoss(0, blocks[0], inputs, goals, [(0, 0), (0, 1), (0, 2)], torch.device("cpu"), ALONE)
    named = dict(blocks[0].named_parameters())
    found = loss.gradients([0, 1], named, GradScaler("cpu", enabled=False))

    twin = copy.deepcopy(blocks[0]).double()
    errors = []
    for number in (0, 1):
        args, kwargs = inputs[number].calls[0]
        kwargs = change_tensors(kwargs, lambda value: value.double() if value.is_floating_point() else value)
        output = hidden_of(twin(inputs[number].hidden.double(), *args, **kwargs))
        target = goals[number].hidden.double()
        each = (output - target).square().sum(-1) / target.square().sum(-1)
        errors.append(each[tokens[number][None].bool()])
    expected = torch.cat(errors).mean()
    wanted = torch.autograd.grad(expected, list(twin.parameters()))
    assert loss.of([0, 1]) == pytest.approx(float(expected), rel=1e-5)
    for (name, gradient), other in zip(found.items(), wanted, strict=True):
        assert torch.allclose(gradient.double(), other, rtol=1e-3, atol=1e-5 * float(other.abs().max())), name
    assert sum(len(part) for part in errors) == 24 + 15  # a control: padding is there


def test_it_is_pruning_and_reconstructing_block_after_block():
    model, dense, step = llama(), llama(), llama()
    report = pruned(model, reconstruction=FEW)
    masks = []
    for number in range(2):
        part = prune_sequentially(
            step, ids().split(1), SparseGPT(NM(2, 4)), targets=f"model.layers.{number}.*", progress=False
        )
        masks.append(part.masks)
        found = reconstruct_(step, dense, ids().split(3), part.masks, FEW, progress=False)
        assert [block.name for block in found.blocks] == [f"model.layers.{number}"]
    assert report.masks == MaskSet.join(masks)
    for (name, value), other in zip(model.named_parameters(), step.parameters(), strict=True):
        assert torch.allclose(value, other, atol=2e-5), name
    assert all(block.after < block.before and not block.put_back for block in report.reconstruction)
    control = llama()
    pruned(control)
    assert not torch.allclose(control.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_blocks_come_nearer_to_the_dense_model():
    text, dense = ids(4, seed=1), llama()
    with torch.no_grad():
        target = dense(text).logits
        errors = []
        for setting in (None, BlockReconstruction(passes=6, learning_rate=0.01)):
            model = llama()
            prune_sequentially(model, ids(48).split(4), Magnitude(NM(2, 4)), reconstruction=setting, progress=False)
            errors.append(float((model(text).logits - target).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_zeros_stay_and_whatever_may_not_change_is_bit_identical():
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    masks = pruned(model).masks
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    dense = llama()
    dense.load_state_dict(before, strict=False)
    dense.model.layers[1].mlp.gate_proj.weight = dense.model.layers[0].mlp.gate_proj.weight
    report = reconstruct_(model, dense, ids().split(4), masks, FEW, progress=False)
    same = {name for name, value in model.named_parameters() if torch.equal(value, start[name])}
    held = {
        "model.layers.0.self_attn.q_proj.weight": "it is not trained",
        "model.layers.0.input_layernorm.weight": "it is not trained",
        "model.layers.0.mlp.gate_proj.weight": "one tensor with a parameter outside",
    }
    outside = {name for name in start if ".layers." not in name}
    assert same == held.keys() | outside
    assert all(held[name] in report.untrained[name] for name in held)
    assert masks.violations(model.named_parameters()) == {}
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert all(value.grad is None for value in model.parameters())
    assert not any(
        torch.signbit(value[~masks[name]]).any() for name, value in model.named_parameters() if name in masks
    )


def test_control_without_masks_the_zeros_are_trained_away():
    model, dense = llama(), llama()
    masks = pruned(model).masks
    part = MaskSet({name: masks[name] for name in masks if "down_proj" not in name})
    reconstruct_(model, dense, ids().split(4), part, FEW, progress=False)
    assert masks.violations(model.named_parameters()).keys() == masks.keys() - part.keys()


def test_only_weights_are_trained_on_demand():
    model, dense = llama(), llama()
    masks = pruned(model).masks
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    setting = BlockReconstruction(passes=1, trained="weights", held_out=0)
    reconstruct_(model, dense, ids().split(4), masks, setting, progress=False)
    assert {name for name, value in model.named_parameters() if not torch.equal(value, before[name])} == set(masks)


def test_routers_stay_and_experts_are_trained():
    model = model_of("mixtral")
    dense = copy.deepcopy(model)
    batches = list(torch.randint(3, 61, (8, 16), generator=torch.Generator().manual_seed(0)).split(2))
    report = prune_sequentially(
        model, batches, Wanda(NM(2, 4)), min_expert_tokens=1, reconstruction=FEW, progress=False
    )
    gates = [name for name, _ in model.named_parameters() if ".gate." in name]
    assert gates
    assert all("router" in report.untrained[name] for name in gates)
    weights, others = dict(model.named_parameters()), dict(dense.named_parameters())
    assert all(torch.equal(weights[name], others[name]) for name in gates)
    control = copy.deepcopy(dense)
    prune_sequentially(control, batches, Wanda(NM(2, 4)), min_expert_tokens=1, progress=False)
    fused = next(name for name in report.masks if "experts" in name)
    assert not torch.equal(weights[fused], dict(control.named_parameters())[fused])
    assert report.masks.violations(model.named_parameters()) == {}


def test_a_block_that_would_end_worse_is_put_back():
    model, dense, control = llama(), llama(), llama()
    report = pruned(model, reconstruction=BlockReconstruction(passes=4, learning_rate=1e4, held_out=0.25))
    masks = pruned(control).masks
    assert all(block.put_back and block.after == block.before for block in report.reconstruction)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), control.parameters(), strict=True))
    found = reconstruct_(control, dense, ids().split(4), masks, FEW, progress=False)
    assert not any(block.put_back for block in found.blocks)


def test_the_best_pass_counts_and_two_without_gain_end_a_block(monkeypatch):
    losses = iter([1.0, 1.1, 1.2, 0.9, 0.8, 0.85, 0.95, 0.1])
    seen = []

    def of(self, places):
        seen.append(self._block.mlp.up_proj.weight.detach().clone())
        return next(losses)

    monkeypatch.setattr(BlockLoss, "of", of)
    model, dense = llama(), llama()
    masks = pruned(model, targets="model.layers.0.*").masks
    report = reconstruct_(
        model, dense, ids().split(4), masks, BlockReconstruction(passes=8, held_out=0.25), progress=False
    )
    (block,) = report.blocks
    assert (block.before, block.after, block.best_pass, len(seen)) == (1.0, 0.8, 4, 7)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, seen[4])
    assert not torch.equal(seen[4], seen[6])


class Shared(nn.Module):
    """Two parameters that autograd gives one tensor for, one of them pruned; and a layer that few windows reach."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.delta = nn.Parameter(torch.zeros(8, 8))
        self.rare = nn.Linear(8, 8)

    def forward(self, x):
        if float(x.detach().sum()) > 1e6:
            x = self.rare(x)
        return x + torch.nn.functional.linear(x, self.layer.weight + self.delta)


def test_two_parameters_may_have_one_gradient():
    torch.manual_seed(0)
    model = Stack(Shared())
    dense = copy.deepcopy(model)
    setting = BlockReconstruction(passes=1, learning_rate=0.01, batch_size=3, held_out=0)
    report = prune_sequentially(
        model,
        list(torch.randn(6, 5, 8).split(1)),
        Magnitude(NM(2, 4)),
        targets="*.layer",
        reconstruction=setting,
        progress=False,
    )
    keep = report.masks["blocks.0.layer.weight"]
    delta = model.blocks[0].delta
    assert bool((delta[~keep] != 0).all())  # `mask_gradients` of the layer leaves the other's gradient alone
    assert bool((model.blocks[0].layer.weight[~keep] == 0).all())
    assert torch.equal(model.blocks[0].rare.weight, dense.blocks[0].rare.weight)


def test_gradients_of_several_windows_are_sums_also_of_one_tensor():
    torch.manual_seed(0)
    block = Shared()
    x, y = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    inputs, goals = ([BlockInputs(row[None], [((), {})], None) for row in rows] for rows in (x, y))
    loss = BlockLoss(0, block, inputs, goals, [(0, 0), (0, 1), (0, 2)], torch.device("cpu"), ALONE)
    named = dict(block.named_parameters())
    found = loss.gradients([0, 1, 2], named, GradScaler("cpu", enabled=False))
    expected = ((block(x) - y).square().sum(-1) / y.square().sum(-1)).mean()
    wanted = torch.autograd.grad(expected, [block.layer.weight, block.delta])
    for name, value in zip(("layer.weight", "delta"), wanted, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert not found["rare.weight"].any()


def test_a_window_that_reaches_no_trained_parameter_is_passed_over():
    torch.manual_seed(0)
    block = Shared()
    inputs = [BlockInputs(torch.randn(1, 5, 8), [((), {})], None)]
    loss = BlockLoss(0, block, inputs, inputs, [(0, 0)], torch.device("cpu"), ALONE)
    block.requires_grad_(False)
    block.rare.requires_grad_(True)
    found = loss.gradients([0], dict(block.rare.named_parameters()), GradScaler("cpu", enabled=False))
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_steps_are_relative_to_the_scale_of_a_parameter_and_fall(schedule):
    parameters = {"big": nn.Parameter(torch.full((4, 4), 10.0)), "small": nn.Parameter(torch.full((4,), 0.1))}
    parameters["new"] = nn.Parameter(torch.zeros(4))
    setting = BlockReconstruction(learning_rate=0.01, schedule=schedule)
    optimizer = _MaskedAdam(parameters, MaskSet({"big": torch.ones(4, 4).bool()}), setting, 4)
    moved = []
    for _ in range(4):
        before = {name: value.detach().clone() for name, value in parameters.items()}
        optimizer.step({name: torch.ones_like(value) for name, value in parameters.items()})
        moved.append({name: float((before[name] - value).mean()) for name, value in parameters.items()})
    factors = {"linear": (1, 0.75, 0.5, 0.25), "cosine": (1, 0.853553, 0.5, 0.146447), "constant": (1, 1, 1, 1)}
    for step, factor in zip(moved, factors[schedule], strict=True):  # Adam's steps on equal gradients are the rate
        assert step["big"] == pytest.approx(0.1 * factor, rel=1e-3)
        assert step["small"] == pytest.approx(0.001 * factor, rel=1e-3)
        assert step["new"] == pytest.approx(0.1 * factor, rel=1e-3)  # zeros take the scale of the matrices


def test_float16_gradients_do_not_underflow():
    model, dense = llama().half(), llama().half()
    masks = MaskSet.join(pruned(llama(), targets="*.mlp.*").masks for _ in range(1))
    masks.apply_(model.named_parameters())
    report = reconstruct_(model, dense, ids().split(4), masks, FEW, progress=False)
    assert all(block.after < block.before for block in report.blocks)
    assert masks.violations(model.named_parameters()) == {}


def test_a_loss_that_is_no_longer_finite_ends_a_block_with_a_warning(monkeypatch):
    losses = iter([1.0, 0.9, math.nan])
    monkeypatch.setattr(BlockLoss, "of", lambda self, places: next(losses))
    model, dense = llama(), llama()
    masks = pruned(model, targets="model.layers.0.*").masks
    with pytest.warns(UserWarning, match="model.layers.0: the loss is nan after pass 2 of 4, so the training ends"):
        report = reconstruct_(model, dense, ids().split(4), masks, BlockReconstruction(), progress=False)
    assert (report.blocks[0].after, report.blocks[0].best_pass) == (0.9, 1)


def test_padding_of_a_decoder_and_of_flat_tokens():
    values = torch.arange(24.0).view(2, 3, 4)
    own, other = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.ones(2, 5).bool()
    window = BlockInputs(values, [((), {})], other, beside=(own,))
    assert torch.equal(_real(window, values), values[own])
    assert torch.equal(_real(window, values.flatten(0, 1)), values[own])
    with pytest.raises(ValueError, match=r"cannot be told from text in hidden states of shape \(2, 4, 4\)"):
        _real(window, torch.zeros(2, 4, 4))
    assert _real(BlockInputs(values, [((), {})], None), values) is values  # a control: no padding


def test_batches_are_cut_into_windows_only_where_that_is_clear():
    def count(batch):
        return [len(single_windows([batch], FEW_OF_ANY, ALONE).mine)][0]

    tokens = ids(3, 6)
    assert count(tokens) == 3
    assert count({"input_ids": tokens, "attention_mask": tokens, "use_cache": False}) == 3
    shared = {"input_ids": tokens, "position_ids": torch.arange(6)[None]}
    cut = single_windows([shared], FEW_OF_ANY, ALONE).mine
    assert [tuple(window["position_ids"].shape) for window in cut] == [(1, 6)] * 3
    axes = {"input_ids": tokens, "position_ids": torch.arange(6).expand(3, 3, 6)}  # (axes, batch, tokens)
    assert count(axes) == 1
    assert count({"pixel_values": torch.zeros(2, 3, 4, 4)}) == 2
    assert count({"pixel_values": torch.zeros(2, 3, 4, 4), "boxes": torch.zeros(5, 4)}) == 1


def test_held_out_windows_take_no_part(monkeypatch):
    parts = {"trained": set(), "judged": set()}
    gradients, of = BlockLoss.gradients, BlockLoss.of
    monkeypatch.setattr(
        BlockLoss,
        "gradients",
        lambda self, places, *rest: (parts["trained"].update(places), gradients(self, places, *rest))[1],
    )
    monkeypatch.setattr(BlockLoss, "of", lambda self, places: (parts["judged"].update(places), of(self, places))[1])
    pruned(llama(), reconstruction=FEW)
    assert parts == {"trained": set(range(6)), "judged": {6, 7}}
    parts.update(trained=set(), judged=set())
    pruned(llama(), reconstruction=BlockReconstruction(passes=1, held_out=0))
    assert parts == {"trained": set(range(8)), "judged": set(range(8))}


def test_small_steps_of_16_bit_weights_are_not_rounded_away():
    model, dense = llama().bfloat16(), llama().bfloat16()
    masks = pruned(model).masks
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    setting = BlockReconstruction(passes=8, learning_rate=3e-4, schedule="constant", held_out=0.25)  # below half an ulp
    report = reconstruct_(model, dense, ids().split(4), masks, setting, progress=False)
    weights = dict(model.named_parameters())
    moved = [float((weights[name] != before[name])[masks[name]].float().mean()) for name in masks]
    assert min(moved) > 0.05
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert all(block.after < block.before for block in report.blocks)
    assert masks.violations(model.named_parameters()) == {}


def test_two_ranks_are_one(tmp_path):
    together(HERE / "reconstruction_ranks.py", tmp_path)


def test_the_order_and_the_size_of_batches_do_not_matter():
    models = [llama(), llama()]
    windows = ids()
    for model, batches in zip(models, (windows.split(1), windows.flip(0).split(8)), strict=True):
        prune_sequentially(model, batches, Magnitude(NM(2, 4)), reconstruction=FEW, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_random_numbers_and_the_mode_of_the_model_stay():
    model = llama().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pruned(model, reconstruction=FEW)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"passes": 0}, "passes must be a whole number of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, got 1.5"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number, got nan"),
        ({"learning_rate": "a"}, "learning_rate must be a finite number, got 'a'"),
        ({"held_out": None}, "held_out must be a finite number, got None"),
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"held_out": 1.0}, r"held_out is a share, in \[0, 1\), got 1.0"),
        ({"trained": "norms"}, 'trained must be "all" or "weights"'),
    ],
)
def test_wrong_settings_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        BlockReconstruction(**settings)


def refused(text, model, **changes):
    """Looks that a call fails before the model changes."""
    before = copy.deepcopy(model.state_dict())
    arguments = {"batches": ids().split(4), "pruner": Magnitude(NM(2, 4)), "reconstruction": FEW} | changes
    with pytest.raises(ValueError, match=text):
        prune_sequentially(model, arguments.pop("batches"), arguments.pop("pruner"), progress=False, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_input_is_refused_before_work():
    refused("there is 1, so none is left to train on: give more windows, or held_out=0", llama(), batches=[ids(1)])
    refused("BlockReconstruction needs calibration batches, got None", llama(), batches=None)
    refused("reconstruction must be a BlockReconstruction, got 6", llama(), reconstruction=6)
    refused('use order="sequential"', llama(), order="at_once")
    refused("SparseGPTQ rounds the weights", llama(), pruner=SparseGPTQ(NM(2, 4)))
    refused("all of them are frozen", llama().requires_grad_(False))
    embeds = torch.randn(4, 6, 32)
    embeds[2, 3, 1] = math.nan
    refused(
        "calibration batch 1 holds NaN or inf in inputs_embeds", llama(), batches=[ids(1), {"inputs_embeds": embeds}]
    )


def test_blocks_in_no_chain_are_refused_before_work():
    with pytest.warns(UserWarning, match="the whole model runs again"):
        refused("reconstruction needs blocks that form a chain", NoChain())


class NoChain(nn.Module):
    """The residual stands outside of the blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(200, 8)
        self.blocks = nn.ModuleList(Affine(8) for _ in range(3))

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_models_and_masks_that_do_not_fit_are_refused():
    model, dense = llama(), llama()
    masks = pruned(model).masks
    wider = tiny_llama(0, hidden_size=64, layers=2)
    deeper = tiny_llama(0, hidden_size=32, layers=3)
    for other, text in (
        (wider, "the dense model's blocks have another shape"),
        (deeper, r"model.layers.2.* has shape .* there and no such parameter here"),
        (model, "the dense model has zeros wherever the masks prune"),
        (copy.deepcopy(model), "the dense model has zeros wherever the masks prune"),
    ):
        with pytest.raises(ValueError, match=text):
            reconstruct_(model, other, ids().split(4), masks, FEW, progress=False)
    with pytest.raises(ValueError, match="weights that the masks prune are not zero, first in model.layers.0"):
        reconstruct_(dense, llama(1), ids().split(4), masks, FEW, progress=False)
    with pytest.raises(ValueError, match="these masks belong to another model"):
        reconstruct_(model, dense, ids().split(4), MaskSet({"a.weight": torch.ones(2, 2).bool()}), FEW, progress=False)
    with pytest.raises(ValueError, match="can be trained"):
        reconstruct_(model.requires_grad_(False), dense, ids().split(4), masks, FEW, progress=False)


def test_outputs_that_are_not_finite_name_the_block():
    model, dense = llama(), llama()
    masks = pruned(model).masks
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="model.layers.1: the outputs of the pruned block, or of the dense one"):
        reconstruct_(model, dense, ids().split(4), masks, FEW, progress=False)


def test_progress_names_the_block_and_its_loss(capsys):
    model, dense = llama(), llama()
    masks = pruned(model).masks
    reconstruct_(model, dense, ids().split(4), masks, FEW)
    shown = capsys.readouterr().out
    assert "reconstructing model.layers.1, pass 2" in shown
    assert "blocks" in shown
