"""What is a stage and a target of a module, what stays dense, and in which order stages are pruned."""

import copy
import warnings

import pytest
import torch
import zoo
from test_any_module import by_hand
from topologies import Block, Model, made, rerun_masks
from torch import nn

from prune_callbacks import (
    MRP,
    NM,
    OWL,
    Grid,
    LagrangianAllocation,
    Magnitude,
    SparseGPT,
    SparseGPTQ,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.anatomy.stages import find_stages, stage_targets
from prune_callbacks.calibration.in_turn import InTurn, calibration_source
from prune_callbacks.calibration.sources import Chain, Rerun
from prune_callbacks.ranks import ALONE

HALF = Unstructured(0.5)


def in_line(model, x, ids):
    for block in model.blocks:
        x = block(x)
    return x


def pruned(model, batches, pruner, **settings):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report = prune_sequentially(model, batches, pruner, progress=False, **settings)
    return report, [str(warning.message) for warning in heard]


def kind(name):
    step, batches, stages, _ = zoo.made(name)
    return step, batches, stages, [batch if isinstance(batch, dict) else batch[0] for batch in batches]


@pytest.mark.parametrize("pruner", [Wanda(HALF), SparseGPT(HALF)], ids=["Wanda", "SparseGPT"])
@pytest.mark.parametrize("name", ["MLP", "ResNet", "U-Net with skips", "nn.TransformerEncoder", "BERT", "T5"])
def test_at_once_takes_all_statistics_from_the_dense_model(name, pruner):
    step, batches, stages, inputs = kind(name)
    dense = copy.deepcopy(step)
    sequential, _ = pruned(copy.deepcopy(step.model), inputs, pruner)
    report, _ = pruned(step.model, inputs, pruner, order="at_once")
    expected = {}
    for stage in stages:  # every stage by itself: all others are dense
        expected |= zoo.rerun(dense, batches, [stage], by_hand(pruner))[1]
    assert report.masks.keys() == expected.keys()
    assert all(torch.equal(report.masks[parameter], keep) for parameter, keep in expected.items())
    assert report.masks != sequential.masks  # the control


def test_an_order_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r'order must be "sequential" or "at_once", got \'backwards\''):
        prune_sequentially(nn.Linear(2, 2), [], Magnitude(HALF), order="backwards")


@pytest.mark.parametrize("pruner", [Wanda(HALF), MRP(HALF)], ids=["Wanda", "MRP"])
def test_a_chain_and_running_the_model_again_give_the_same(pruner):
    torch.manual_seed(0)
    batches = list(torch.randint(23, (6, 9)).split(2))
    model = made(in_line)
    blocks = list(model.blocks)
    assert isinstance(calibration_source(model, blocks, batches, ALONE), Chain)
    chain, told = pruned(copy.deepcopy(model), batches, pruner, blocks="blocks")
    assert not told
    # One layer more, in front of the blocks, which changes nothing: blocks by a chain after it.
    head = model.head
    del model.head
    model.front, model.head = nn.Linear(2, 2).double(), head
    model.walk = lambda model, x, ids: (model.front(x[..., :2]), in_line(model, x, ids))[1]
    again, _ = pruned(copy.deepcopy(model), batches, pruner)
    assert set(again.masks) - set(chain.masks) == {"front.weight"}
    assert all(torch.equal(again.masks[name], keep) for name, keep in chain.masks.items())
    # And with a block of another list between them, where no chain is.
    del model.head
    model.others, model.head = nn.ModuleList([Block().double()]), head
    model.walk = lambda model, x, ids: in_line(model, (model.blocks[0](x), model.others[0](x))[1] * 0 + x, ids)
    third, told = pruned(copy.deepcopy(model), batches, pruner)
    assert {name for name in third.masks if "others" in name} == {"others.0.up.weight", "others.0.down.weight"}
    assert all(torch.equal(third.masks[name], keep) for name, keep in chain.masks.items())


def test_layers_around_the_blocks_are_pruned_in_their_turn():
    class Framed(Model):
        """A layer is defined last and runs first; one runs after the blocks; the last one makes the output."""

        def __init__(self):
            super().__init__(in_line)
            self.neck = nn.Linear(8, 8)
            self.out = nn.Linear(8, 3)
            self.enter = nn.Linear(8, 8)
            self.last = nn.Linear(3, 3)

        def forward(self, ids):
            x = in_line(self, torch.tanh(self.enter(self.embedding(ids))), ids)
            return self.last(torch.tanh(self.out(torch.tanh(self.neck(x)))))

    torch.manual_seed(0)
    model = Framed().double().eval()
    batches = list(torch.randint(23, (6, 9)).split(2))
    stages = find_stages(model)
    assert [name for name, _ in stages.parts] == [
        *(f"blocks.{i}" for i in range(3)),
        "head",
        "neck",
        "out",
        "enter",
        "last",
    ]
    expected = rerun_masks(model, ["enter", "blocks.0", "blocks.1", "blocks.2", "neck", "out"], batches)
    source = calibration_source(model, [part for _, part in stages.parts[:-1]], batches, ALONE, stages.lists[:-1])
    assert isinstance(source, InTurn)
    assert [list(run) for run in source.runs] == [[6], [0, 1, 2], [4, 5, 3]]
    kinds = [type(source._make(run)) for run in source.runs]
    assert kinds == [Rerun, Chain, Rerun]
    report, told = pruned(model, batches, Wanda(HALF))
    # `head` is never called here: named, and dense.
    assert report.skipped.keys() == {"head.weight", "last.weight"}
    assert any("head stays dense: its forward was never called" in text for text in told)
    assert report.masks.keys() == expected.keys()
    assert all(torch.equal(report.masks[name], keep) for name, keep in expected.items())


def test_both_stacks_of_an_encoder_decoder_run_as_chains():
    step, _, _, inputs = kind("BART")
    step.eval()
    stages = find_stages(step.model)
    source = calibration_source(step.model, [part for _, part in stages.parts], inputs, ALONE, stages.lists)
    assert [list(run) for run in source.runs] == [[0, 1], [2, 3]]
    assert all(isinstance(source._make(run), Chain) for run in source.runs)


@pytest.mark.parametrize("allocation", [OWL(), LagrangianAllocation()], ids=["OWL", "Lagrangian"])
@pytest.mark.parametrize("name", ["ResNet", "depthwise-separable CNN", "BART"])
def test_allocations_measure_any_module(name, allocation):
    step, _, _, inputs = kind(name)
    report, _ = pruned(step.model, inputs, Wanda(HALF), allocation=allocation)
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert len({round(layer.sparsity, 3) for layer in report.layers}) > 1
    assert report.masks.violations(step.model.named_parameters()) == {}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 8)
        self.frozen, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.head = nn.Linear(8, 23, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.randn(8, 8))
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = torch.tanh(self.first(self.frozen(self.embedding(ids))))
        return self.head(self.up(x.mT).mT @ self.scale), self.second(x)


def test_what_is_left_out_is_named_and_can_be_asked_for():
    torch.manual_seed(0)
    batches = [torch.randint(23, (4, 5))]
    report, _ = pruned(Tied(), batches, Wanda(HALF))
    assert set(report.masks) == {"first.weight"}
    reasons = {
        "frozen.weight": "is not trained (requires_grad=False)",
        "second.weight": "it is the last layer that is called, which makes the output",
        "head.weight": "that of an nn.Embedding too, which is never pruned",
        "scale": "a parameter of Tied, which is no layer that can be pruned",
        "up.weight": "a parameter of ConvTranspose1d, which is no layer that can be pruned",
    }
    assert report.skipped.keys() == reasons.keys()
    assert all(text in report.skipped[name] for name, text in reasons.items())
    report, _ = pruned(Tied(), batches, Wanda(HALF), targets=["second", "frozen"])
    assert set(report.masks) == {"second.weight", "frozen.weight"}
    report, _ = pruned(Tied(), batches, Wanda(HALF), targets="f*")
    assert set(report.masks) == {"first.weight"}  # a trained one matches, so the frozen one is not looked for
    with pytest.raises(ValueError, match=r"layer head cannot be pruned: its weight is that of an nn.Embedding"):
        pruned(Tied(), batches, Wanda(HALF), targets="head")
    with pytest.raises(ValueError, match=r"target 'third' matches no layer"):
        pruned(Tied(), batches, Wanda(HALF), targets="third")
    alone = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"no layer of Sequential is a target by default; 0: it is the last layer"):
        pruned(alone, [torch.randn(4, 8)], Wanda(HALF))
    assert pruned(alone, [torch.randn(4, 8)], Wanda(HALF), targets="0")[0].masks.sparsity() == 0.5
    with pytest.raises(ValueError, match=r"LayerNorm has no layer to prune: no linear layer, convolution"):
        pruned(nn.LayerNorm(8), [torch.randn(4, 8)], Wanda(HALF))


def test_layers_that_do_not_fit_stay_dense_by_default_and_are_refused_by_name():
    step, _, _, inputs = kind("ResNet")
    report, told = pruned(copy.deepcopy(step.model), inputs, Wanda(NM(2, 4)))
    assert "needs input channels (of a group) divisible by 4, got 3" in report.skipped["stem.weight"]
    assert any("1 layers stay dense, first stem.weight" in text for text in told)
    assert set(report.masks) == {f"layers.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)} | {
        "layers.1.shortcut.weight"
    }
    report.masks.check(NM(2, 4), convolutions=report.convolutions)
    with pytest.raises(ValueError, match=r"layer stem: NM\(.*\) needs input channels .* divisible by 4, got 3"):
        pruned(copy.deepcopy(step.model), inputs, Wanda(NM(2, 4)), targets="stem")
    # 6 channels by 2 places are 12 columns, which 4 divides, but not the channels.
    uneven = nn.Sequential(nn.Conv1d(6, 4, 2), nn.Conv1d(4, 4, 1))
    with pytest.raises(
        ValueError, match=r"no layer fits NM.*0.weight.*input channels \(of a group\) divisible by 4, got 6"
    ):
        pruned(uneven, [torch.randn(2, 6, 5)], Wanda(NM(2, 4)))
    # Pruners of units or with a grid take linear layers alone.
    with pytest.raises(ValueError, match="no nn.Linear or Conv1D to prune"):
        pruned(uneven, [torch.randn(2, 6, 5)], SparseGPTQ(NM(2, 4), Grid()))


class Attending(nn.Module):
    """Attends to others by keys and values of another size, and to itself; called twice, once in each way."""

    def __init__(self, sizes):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.head = nn.Linear(8, 3)

    def forward(self, x, others):
        return self.head(self.attention(x, others, value=others)[0])


@pytest.mark.parametrize("sizes", [{"kdim": 6, "vdim": 6}, {}], ids=["three parameters", "one parameter"])
def test_attention_to_others(sizes):
    torch.manual_seed(0)
    model = Attending(sizes).double()
    width = sizes.get("kdim", 8)
    batches = [{"x": torch.randn(3, 5, 8).double(), "others": torch.randn(3, 4, width).double()} for _ in range(3)]
    q, k, v = (
        (model.attention.q_proj_weight, model.attention.k_proj_weight, model.attention.v_proj_weight)
        if sizes
        else model.attention.in_proj_weight.chunk(3)
    )
    norms = [sum(batch[key].flatten(0, 1).square().sum(0) for batch in batches) for key in ("x", "others", "others")]
    expected = []
    for weight, norm in zip((q, k, v), norms, strict=True):
        scores = (weight.abs() * norm.sqrt()).detach()
        expected.append(scores >= scores.sort(1, descending=True).values[:, scores.shape[1] // 2 - 1 :][:, :1])
    report, _ = pruned(model, batches, Wanda(HALF))
    masks = report.masks
    if sizes:
        found = [masks[f"attention.{part}_proj_weight"] for part in "qkv"]
    else:
        found = masks["attention.in_proj_weight"].chunk(3)
    for mask, keep in zip(found, expected, strict=True):
        assert torch.equal(mask, keep)
    assert masks["attention.out_proj.weight"].float().mean() == 0.5
    assert "forward" not in vars(model.attention)
    assert model.attention.out_proj.bias is not None
    if not sizes:
        part, _ = pruned(Attending({}).double(), batches, Wanda(HALF), targets="*.in_proj_weight.key")
        shares = [float(keep.float().mean()) for keep in part.masks["attention.in_proj_weight"].chunk(3)]
        assert shares == [1.0, 0.5, 1.0]
        whole, _ = pruned(Attending({}).double(), batches, Wanda(HALF), targets="in_proj_weight")
        assert whole.masks["attention.in_proj_weight"].float().mean() == 0.5


@pytest.mark.parametrize(
    ("layer", "settings"),
    [(nn.LSTM, {"proj_size": 4}), (nn.RNN, {"bidirectional": True}), (nn.GRUCell, {})],
    ids=["LSTM", "RNN", "GRUCell"],
)
def test_recurrent_layers_are_pruned_by_magnitude_and_it_is_said(layer, settings):
    torch.manual_seed(0)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = layer(6, 8, **settings).double(), nn.Linear(4, 2).double()

        def forward(self, x):
            output = self.inner(x)
            return self.head((output[0] if isinstance(output, tuple) else output)[..., :4])

    model, inputs = Around(), [torch.randn(5, 6).double()]
    matrices = {f"inner.{n}": p.detach().clone() for n, p in model.inner.named_parameters() if p.ndim == 2}
    report, told = pruned(model, inputs, SparseGPT(HALF))
    assert set(report.masks) == set(report.by_magnitude) == set(matrices)
    assert set(report.by_magnitude.values()) == {0}
    assert any("inner.weight_ih" in text and "so they are pruned by Magnitude" in text for text in told)
    for name, weight in matrices.items():
        least = weight.abs().flatten().sort().values[weight.numel() // 2]
        assert torch.equal(report.masks[name], weight.abs() >= least)
    assert not any("by Magnitude" in text for text in pruned(Around(), inputs, Magnitude(HALF))[1])


def test_a_tower_is_pruned_by_name_and_several_lists_too():
    step, _, _, inputs = kind("CLIP")
    tower, text = "vision_model.encoder.layers", "text_model.encoder.layers"
    report, _ = pruned(copy.deepcopy(step.model), inputs, Wanda(HALF))
    assert "name it with `blocks` to prune it" in report.skipped[tower]
    assert all(name.startswith(text) for name in report.masks)
    both, _ = pruned(copy.deepcopy(step.model), inputs, Wanda(HALF), blocks=[text, tower])
    alone, _ = pruned(copy.deepcopy(step.model), inputs, Wanda(HALF), blocks=tower)
    assert {name for name in both.masks if name.startswith(text)} == set(report.masks)
    assert all(torch.equal(both.masks[name], keep) for name, keep in [*report.masks.items(), *alone.masks.items()])
    with pytest.raises(ValueError, match="blocks is empty"):
        pruned(step.model, inputs, Wanda(HALF), blocks=[])
    with pytest.raises(ValueError, match=r"blocks='tower' is no nn.ModuleList of CLIPModel"):
        pruned(step.model, inputs, Wanda(HALF), blocks=["tower"])


def test_depthwise_convolutions_in_blocks_of_transformers_are_pruned_by_name():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4, time_step_rank=2)
    model, batches = hf.MambaForCausalLM(config), [torch.randint(50, (3, 8))]
    targets, left = stage_targets(model, find_stages(model))
    assert not any("conv1d" in name for name in targets)
    assert "it is a depthwise convolution" in left["backbone.layers.0.mixer.conv1d.weight"]
    report, _ = pruned(model, batches, Magnitude(HALF), targets="conv1d")
    assert set(report.masks) == {f"backbone.layers.{i}.mixer.conv1d.weight" for i in (0, 1)}
    assert report.masks.sparsity() == 0.5
