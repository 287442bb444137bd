import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from prune_callbacks import (
    GPTQ,
    MRP,
    NM,
    Gram,
    Magnitude,
    OneShotPrune,
    SparseGPT,
    Unstructured,
    Wanda,
    prune_checkpoint,
    prune_sequentially,
)
from prune_callbacks.anatomy.target import LayerTarget
from prune_callbacks.calibration.collect import collect
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.memory import peak_memory
from prune_callbacks.solvers.linalg import damp
from prune_callbacks.studies import sensitivity


@pytest.fixture
def batches():
    return list(torch.randint(3, 200, (6, 16)).split(2))


def test_the_report_tells_what_was_done(tiny, batches):
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    tiny.train()
    report = prune_sequentially(tiny, batches, SparseGPT(Unstructured(0.5)), progress=False)
    assert tiny.training
    assert report.sparsity == 0.5
    assert [layer.name for layer in report.layers] == list(report.masks)
    for layer in report.layers:
        assert layer.sparsity == 0.5
        assert layer.shape == tuple(tiny.get_parameter(layer.name).shape)
        assert 0 < layer.relative_loss < 1
        assert layer.loss > 0
    assert report.peak_memory_bytes > 10e6
    untouched = [n for n, p in tiny.named_parameters() if torch.equal(p, before[n])]
    assert {n for n in before if n not in report.masks} == set(untouched)


def test_layers_that_share_an_input_share_one_gram(tiny, batches, monkeypatch):
    made = []

    class Counting(SparseGPT):
        def statistic(self, in_features, device=None):
            made.append(in_features)
            return super().statistic(in_features, device)

    prune_sequentially(tiny, batches, Counting(NM(2, 4)), progress=False)
    made = [size for size in made if size > 1]
    # q, k and v share one; gate and up share one; o and down have their own: four a block, not seven.
    assert len(made) == 2 * 4


class Repeating(nn.Module):
    """A block with two layers, the second of which is called once for every so many rows."""

    def __init__(self, rows):
        super().__init__()
        self.first, self.second, self.rows = nn.Linear(8, 8), nn.Linear(8, 8), rows

    def forward(self, x):
        x = self.first(x)
        for _ in range(len(x) // self.rows):
            x = self.second(x)
        return x


@pytest.mark.parametrize(
    ("rows", "sizes", "targets", "products"),
    [
        (4, (4, 4, 4), ["first", "second"], 1),  # the first pass is whole; the others end where `second` is reached
        (4, (4, 4, 4), ["first"], 1),
        (2, (4, 4, 4), ["first", "second"], 2 * 3),  # all are whole where a second call would be missed,
        (4, (4, 9, 4), ["first", "second"], 1 + 2),  # also if only windows of another length have one
        (5, (4, 9, 5), ["first", "second"], 0 + 1 + 1),  # what the first did not reach the others may
    ],
)
def test_a_calibration_pass_ends_where_all_was_seen(rows, sizes, targets, products):
    torch.manual_seed(0)
    block, made = Repeating(rows), []
    block.second.register_forward_hook(lambda *_: made.append(1))
    layers = {name: LayerTarget.of(name, block.get_submodule(name)) for name in targets}
    inputs = [BlockInputs(torch.randn(size, 8), [((), {})], None) for size in sizes]
    grams = collect(lambda size, device: Gram(size, device), 0, block, layers, inputs, torch.device("cpu"))
    assert len(made) == products
    expected = {name: [] for name in targets}
    for name, layer in layers.items():
        layer.module.register_forward_pre_hook(lambda _, args, name=name: expected[name].append(args[0]))
    for batch in inputs:
        block(batch.hidden)
    assert grams.keys() == expected.keys()
    for name, gram in grams.items():
        x = torch.cat(expected[name]).detach()
        assert gram.tokens == len(x)
        torch.testing.assert_close(gram.matrix, x.T @ x)


def test_a_real_error_behind_the_last_layer_is_not_swallowed():
    class Failing(Repeating):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("the cache is full")

    block = Failing(4)
    inputs = [BlockInputs(torch.randn(4, 8), [((), {})], None)]
    second = {"second": LayerTarget.of("second", block.second)}
    with pytest.raises(RuntimeError, match="the cache is full"):
        collect(Wanda(NM(2, 4)).statistic, 0, block, second, inputs, torch.device("cpu"))
    assert not block.second._forward_pre_hooks


def test_magnitude_runs_without_batches(tiny):
    report = prune_sequentially(tiny, None, Magnitude(NM(2, 4)), progress=False)
    assert report.sparsity == 0.5
    assert report.layers[0].loss is None


def test_only_targets_are_pruned(tiny, batches):
    report = prune_sequentially(tiny, batches, Wanda(NM(2, 4)), targets=["*.mlp.*"], progress=False)
    assert all(".mlp." in name for name in report.masks)
    assert len(report.masks) == 6


def test_mrp_prunes_a_whole_model_better_than_wanda(tiny, batches):
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    losses = {}
    for pruner in (SparseGPT(NM(2, 4)), MRP(NM(2, 4))):
        tiny.load_state_dict(state)
        report = prune_sequentially(tiny, batches, pruner, progress=False)
        losses[type(pruner).__name__] = sum(layer.relative_loss for layer in report.layers)
    assert losses["MRP"] < losses["SparseGPT"]


def test_bad_input_is_refused_before_work(tiny, batches):
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    with pytest.raises(ValueError, match=r"layer model.layers.0.self_attn.q_proj: NM\(2, 5\) needs an input size"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 5)), progress=False)
    with pytest.raises(ValueError, match="Wanda needs calibration batches, got None"):
        prune_sequentially(tiny, None, Wanda(NM(2, 4)), progress=False)
    with pytest.raises(ValueError, match="there is no calibration batch"):
        prune_sequentially(tiny, [], Wanda(NM(2, 4)), progress=False)
    with pytest.raises(ValueError, match="matches no layer"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 4)), targets=["nothing"], progress=False)
    with pytest.raises(ValueError, match="token ids from 3 to 259, and LlamaForCausalLM has embeddings for 0 to 258"):
        prune_sequentially(tiny, [torch.tensor([[3, 259]])], Wanda(NM(2, 4)), progress=False)
    with pytest.raises(ValueError, match="device='gpu' is unknown to torch"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 4)), device="gpu", progress=False)
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=f"device='{missing}', and there (are|is) .* CUDA device"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 4)), device=missing, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in tiny.named_parameters())
    assert "forward" not in vars(tiny.model.layers[0])


def test_weights_without_float_values_are_refused(tiny, batches):
    quantized, layer = tiny.model.layers[1].mlp, torch.nn.Linear(96, 32, bias=False)
    layer.weight = torch.nn.Parameter(torch.zeros(32, 96, dtype=torch.int8), requires_grad=False)
    quantized.down_proj = layer
    with pytest.raises(ValueError, match=r"layer model.layers.1.mlp.down_proj: its weight is torch.int8; quantized"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 4)), progress=False)
    quantized.down_proj = torch.nn.Linear(96, 32, bias=False, device="meta")
    with pytest.raises(ValueError, match=r"layer model.layers.1.mlp.down_proj: its weight is on the meta device"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 4)), progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(tiny, batches, bad):
    with torch.no_grad():
        tiny.model.layers[1].mlp.up_proj.weight[0, 0] = 1.0
        tiny.model.layers[1].post_attention_layernorm.weight[0] = bad
    with pytest.raises(ValueError, match=r"layer model.layers.1.mlp.gate_proj: the calibration activations hold NaN"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 4)), progress=False)


def test_a_gram_that_cannot_be_factorised_names_layer_and_damping(tiny, batches):
    pruner = SparseGPT(NM(2, 4), damping=0.0)
    short = [batch[:1, :3] for batch in batches[:1]]
    with pytest.raises(
        ValueError, match=r"layer model.layers.0.self_attn.q_proj, .*v_proj: the damped Gram .* tried damping 0.0"
    ):
        prune_sequentially(tiny, short, pruner, progress=False)


def test_progress_is_shown(tiny, batches, capsys):
    prune_sequentially(tiny, batches, Wanda(NM(2, 4)))
    assert "14/14 layers" in capsys.readouterr().out


def test_peak_memory_is_in_bytes():
    held = torch.ones(50_000_000)
    assert peak_memory(torch.device("cpu")) > held.nbytes


def test_wrong_kinds_of_input_are_named(tiny, batches, unchecked):
    for pruner in (Wanda, Magnitude):
        with pytest.raises(ValueError, match=r"takes a pattern such as Unstructured\(0.5\) or NM\(2, 4\), got 0.5"):
            pruner(0.5)
    with pytest.raises(ValueError, match=r"OneShotPrune takes a pruner such as .*, got NM\(n=2, m=4\)"):
        OneShotPrune(NM(2, 4))
    with pytest.raises(ValueError, match="targets is empty"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 4)), targets=[], progress=False)
    with pytest.raises(ValueError, match=r"got one tensor of shape \(2, 16\); split it"):
        prune_sequentially(tiny, batches[0], Wanda(NM(2, 4)), progress=False)
    for wrong, found in ((batches[0].float(), r"Tensor \(2, 16\)"), ({"ids": batches[0]}, r"\['ids'\]")):
        with pytest.raises(ValueError, match=f"must hold input_ids, integers of shape .*; got {found}"):
            prune_sequentially(tiny, [wrong], Wanda(NM(2, 4)), progress=False)


def test_a_model_whose_embeddings_transformers_does_not_find_is_pruned(batches):
    class Own(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.tok = torch.nn.Embedding(259, 32)
            self.stack = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

        def forward(self, input_ids, **kwargs):
            hidden = self.tok(input_ids)
            for block in self.stack:
                hidden = block(hidden)
            return hidden

    model = Own(LlamaConfig(num_hidden_layers=2))
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    assert prune_sequentially(model, batches, Wanda(NM(2, 4)), progress=False).sparsity == 0.5


def test_too_few_tokens_are_warned_of_once(tiny):
    with pytest.warns(UserWarning, match=r"8 calibration tokens for the 32 input features of model.layers.0") as caught:
        prune_sequentially(tiny, [torch.randint(3, 200, (1, 8))], Wanda(NM(2, 4)), progress=False)
    assert len([w for w in caught if "calibration tokens" in str(w.message)]) == 1


def test_warnings_of_the_solver_name_the_layer(tiny):
    pruner = SparseGPT(NM(2, 4), damping=1e-8)
    with pytest.warns(UserWarning, match=r"layer model.layers.0.self_attn.q_proj: damping 1e-08 was too small"):
        prune_sequentially(
            tiny, [torch.full((1, 8), 7)], pruner, targets="model.layers.0.self_attn.q_proj", progress=False
        )


def test_layers_that_share_an_input_share_one_factorisation(tiny, batches, monkeypatch):
    count = 0

    def counting(gram, damping):
        nonlocal count
        count += 1
        return damp(gram, damping)

    monkeypatch.setattr("prune_callbacks.pruners.joint.damp", counting)
    report = prune_sequentially(tiny, batches, MRP(NM(2, 4)))
    assert len(report.layers) == 2 * 7
    assert count == 2 * 4  # q, k, v; o; gate, up; down
    names = [layer.name for layer in report.layers]
    assert names.index("model.layers.0.mlp.down_proj.weight") < names.index("model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("OneShotPrune", lambda pruner, model, batches, folder: OneShotPrune(pruner)),
        ("prune_sequentially", lambda pruner, model, batches, folder: prune_sequentially(model, batches, pruner)),
        ("prune_checkpoint", lambda pruner, model, batches, folder: prune_checkpoint(folder, folder, pruner, batches)),
        ("sensitivity", lambda pruner, model, batches, folder: sensitivity(model, batches, batches[0], pruner)),
        ("GPTQ", lambda pruner, model, batches, folder: GPTQ(pruner)),
    ],
)
def test_what_is_no_whole_pruner_is_refused_everywhere(tiny, batches, tmp_path, unchecked, name, given):
    class Half:
        pattern = NM(2, 4)

        def statistic(self, in_features, device=None):
            return None

        def __repr__(self):
            return "Half()"

    begins = rf"^{name} takes a pruner such as Wanda\(.*\)"
    for pruner in (Wanda, NM(2, 4), "wanda"):
        with pytest.raises(ValueError, match=f"{begins}, got {re.escape(repr(pruner))}"):
            given(pruner, tiny, batches, tmp_path)
    with pytest.raises(ValueError, match=rf"{begins}, which has pattern, prune, statistic; Half\(\) has no prune"):
        given(Half(), tiny, batches, tmp_path)
