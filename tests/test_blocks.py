import oracles
import pytest
import torch
import transformers as hf
from torch import nn

from prune_callbacks import NM, InputNorm, SparseGPT, Unstructured, Wanda, prune_sequentially
from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.anatomy.targets import find_targets

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FAMILIES = {
    "llama": (hf.LlamaConfig(**COMMON), "model.layers"),
    "qwen2": (hf.Qwen2Config(**COMMON), "model.layers"),
    "gemma3": (
        hf.Gemma3TextConfig(
            **COMMON,
            head_dim=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "model.layers",
    ),
    "opt": (
        hf.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            **IDS,
        ),
        "model.decoder.layers",
    ),
    "gpt2": (hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, **IDS), "transformer.h"),
    "bloom": (hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=4, **IDS), "transformer.h"),
    "mamba": (
        hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=8, time_step_rank=4, **IDS),
        "backbone.layers",
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    config, blocks = FAMILIES[request.param]
    return request.param, hf.AutoModelForCausalLM.from_config(config).eval(), blocks


@pytest.fixture
def batches():
    return list(torch.randint(3, 97, (6, 20)).split(2))


def test_blocks_are_found_by_structure(family):
    _, model, expected = family
    blocks = find_blocks(model)
    assert [name for name, _ in blocks] == [f"{expected}.{i}" for i in range(3)]
    targets = find_targets(blocks)
    assert not any("lm_head" in name or "embed" in name for name in targets)
    kinds = (nn.Linear, hf.pytorch_utils.Conv1D)
    inside = [n for n, m in model.named_modules() if isinstance(m, kinds) and n.startswith(expected + ".")]
    assert list(targets) == inside


@pytest.mark.parametrize("pruner", [Wanda(NM(1, 4)), SparseGPT(Unstructured(0.5))], ids=["wanda", "sparsegpt"])
def test_sequential_pruning_equals_rerunning_the_whole_model(family, batches, pruner):
    """For every block the oracle runs the whole model, pruned so far, and prunes from the gathered inputs."""
    _, model, blocks = family
    reference = hf.AutoModelForCausalLM.from_config(model.config).eval()
    reference.load_state_dict(model.state_dict())
    before = set(model.state_dict())
    report = prune_sequentially(model, batches, pruner, progress=False)
    # OPT's projections beside the blocks, Mamba's depthwise convolutions
    assert all("project_" in name or name.endswith("mixer.conv1d.weight") for name in report.skipped)
    for i in range(3):
        layers = [n.removesuffix(".weight") for n in report.masks if n.startswith(f"{blocks}.{i}.")]
        inputs = oracles.layer_inputs(reference, [n for n in layers if not n.endswith("dt_proj")], batches)
        # The mixer multiplies with dt_proj.weight itself and never calls the module.
        inputs |= {n: oracles.time_steps(reference, n, batches) for n in layers if n.endswith("dt_proj")}
        for layer in layers:
            module = reference.get_submodule(layer)
            weight = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T
            statistic = pruner.statistic(weight.shape[1])
            statistic.update(inputs[layer])
            pruned = pruner.prune(weight, statistic)
            weight.copy_(pruned.weight)
    assert set(model.state_dict()) == before
    for parameter_name, parameter in model.named_parameters():
        expected = reference.get_parameter(parameter_name)
        torch.testing.assert_close(
            parameter, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )
    assert report.masks.violations(model.named_parameters()) == {}
    report.masks.check(pruner.pattern, input_first=report.input_first)
    ids = batches[0]
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "opt", "mamba"])  # OPT's MLP gets its tokens flat
def test_padding_does_not_count(name):
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[name][0])
    ids = torch.randint(3, 97, (3, 16))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    mask[2, 4:] = 0
    seen = []

    class Spy:
        pattern = NM(2, 4)

        def statistic(self, in_features, device=None):
            return InputNorm(in_features, device)

        def prune(self, weight, statistic):
            seen.append(statistic.tokens)
            return Wanda(self.pattern).prune(weight, statistic)

    prune_sequentially(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}], Spy(), progress=False)
    assert set(seen) == {int(mask.sum())}


def test_a_layer_that_is_not_used_is_named(tiny, batches):
    tiny.model.layers[1].mlp.unused = nn.Linear(32, 8)
    before = tiny.model.layers[1].mlp.unused.weight.clone()
    with pytest.warns(UserWarning, match=r"layers.1.mlp.unused stays dense: its forward was never called"):
        report = prune_sequentially(tiny, batches, Wanda(NM(2, 4)), progress=False)
    assert list(report.skipped) == ["model.layers.1.mlp.unused.weight"]
    assert torch.equal(tiny.model.layers[1].mlp.unused.weight, before)


def test_weights_used_without_their_layer_are_seen_however_the_product_is_written():
    """Positive control: cast to another dtype, a weight is not recognised, and the layer is named."""

    class Layer(nn.Module):
        def __init__(self, product):
            super().__init__()
            self.linear, self.product = nn.Linear(8, 8, bias=False), product

        def forward(self, hidden_states):
            return hidden_states + self.product(hidden_states, self.linear.weight)

    class Model(nn.Module):
        def __init__(self, product):
            super().__init__()
            self.blocks = nn.ModuleList([Layer(product)])

        def forward(self, x):
            return self.blocks[0](x)

    products = [
        lambda x, w: nn.functional.linear(x, w),
        lambda x, w: nn.functional.linear(weight=w, input=x),
        lambda x, w: x @ w.T,
        lambda x, w: torch.matmul(x, w.mT),
        lambda x, w: (w @ x.mT).mT,
        lambda x, w: torch.mm(x.flatten(0, 1), w.t()).view_as(x),
        lambda x, w: torch.bmm(x, w.T.expand(len(x), 8, 8)),
    ]
    batches = [torch.randn(3, 5, 8) for _ in range(2)]
    norms = InputNorm(8)
    for batch in batches:
        norms.update(batch)
    for product in products:
        model = Model(product)
        expected = Wanda(NM(2, 4)).prune(model.blocks[0].linear.weight, norms)
        report = prune_sequentially(model, batches, Wanda(NM(2, 4)), progress=False)
        assert torch.equal(report.masks["blocks.0.linear.weight"], expected.keep)
        assert "forward" not in vars(model.blocks[0])
    cast = Model(lambda x, w: (x.double() @ w.double().T).float())
    with (
        pytest.warns(UserWarning, match=r"blocks.0.linear stays dense"),
        pytest.raises(ValueError, match="nothing was pruned"),
    ):
        prune_sequentially(cast, batches, Wanda(NM(2, 4)), progress=False)


def test_shared_weights_are_pruned_once(tiny, batches):
    tiny.model.layers[1].mlp = tiny.model.layers[0].mlp
    tiny.model.layers[0].self_attn.v_proj.weight = tiny.model.layers[0].self_attn.k_proj.weight
    with pytest.warns(UserWarning, match="shares its weight with model.layers.0") as caught:
        report = prune_sequentially(tiny, batches, Wanda(NM(2, 4)), progress=False)
    assert len([w for w in caught if "shares its weight" in str(w.message)]) == 4
    assert len(report.masks) == 14 - 4
    assert report.masks.violations(tiny.named_parameters()) == {}


def test_adapters_are_not_pruned(tiny):
    layer = tiny.model.layers[0].mlp.up_proj
    adapted = nn.Module()
    adapted.base_layer, adapted.lora_A = layer, nn.Linear(32, 4)
    tiny.model.layers[0].mlp.up_proj = adapted
    names = find_targets(find_blocks(tiny))
    assert "model.layers.0.mlp.up_proj.base_layer" in names
    assert "model.layers.0.mlp.up_proj.lora_A" not in names


def test_compiled_blocks_are_refused_and_compiled_models_are_not(tiny, batches):
    report = prune_sequentially(torch.compile(tiny, backend="eager"), batches, Wanda(NM(2, 4)), progress=False)
    assert next(iter(report.masks)).startswith("model.layers.0")
    tiny.model.layers[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"block model.layers.1 is compiled.*prune before compiling"):
        prune_sequentially(tiny, batches, Wanda(NM(2, 4)), progress=False)


def test_older_layers_that_return_tuples():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states, scale=1.0):
            return (hidden_states + scale * self.linear(hidden_states), None)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.blocks = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, ids):
            hidden = self.embedding(ids)
            for block in self.blocks:
                hidden = block(hidden, scale=0.5)[0]
            return hidden

    model = Model()
    batches = [torch.randint(11, (4, 5)) for _ in range(2)]
    norms = InputNorm(8)
    with torch.no_grad():
        for ids in batches:
            norms.update(model.embedding(ids))
    first = Wanda(NM(2, 4)).prune(model.blocks[0].linear.weight, norms)
    report = prune_sequentially(model, batches, Wanda(NM(2, 4)), progress=False)
    assert torch.equal(report.masks["blocks.0.linear.weight"], first.keep)
    assert len(report.masks) == 3


def test_targets_by_pattern(tiny):
    blocks = find_blocks(tiny)
    assert {name.rsplit(".", 1)[-1] for name in find_targets(blocks, "*.mlp.*")} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert len(find_targets(blocks, ["down_proj", "model.layers.1.self_attn.q_proj"])) == 3
    with pytest.raises(ValueError, match=r"target 'w_proj' matches no layer. The first block has model.layers.0"):
        find_targets(blocks, ["down_proj", "w_proj"])


def test_models_without_blocks_say_how_to_name_them(tiny):
    with pytest.raises(ValueError, match=r'it has no nn.ModuleList. Name the list of blocks with blocks="..."'):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"blocks='model.h' is no nn.ModuleList .*\['model.layers'\]"):
        find_blocks(tiny, "model.h")
    tiny.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"no nn.ModuleList has the configuration's 7 layers"):
        find_blocks(tiny)
    assert len(find_blocks(tiny, "model.layers")) == 2


def test_the_language_model_inside_a_module_is_found(tiny):
    assert find_language_model(nn.Sequential(nn.Identity(), tiny)) is tiny
    plain = nn.Linear(2, 2)
    assert find_language_model(plain) is plain
    assert find_language_model(tiny) is tiny


def test_of_student_and_teacher_the_student_is_pruned(tiny):
    teacher = hf.AutoModelForCausalLM.from_config(tiny.config)
    both = nn.ModuleDict({"teacher": teacher, "student": tiny})
    with pytest.raises(ValueError, match=r"holds 2 language models, \['teacher', 'student'\], of which 2 are trained"):
        find_language_model(both)
    teacher.requires_grad_(False)
    assert find_language_model(both) is tiny
