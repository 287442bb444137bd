"""One layer pruned at a time, against pruning a fresh copy and measuring it whole."""

import json
import sys
from pathlib import Path

import families
import pytest
import torch
import transformers as hf
from launch import trained
from scipy.stats import spearmanr

from prune_callbacks import (
    MRP,
    NM,
    Columns,
    LagrangianAllocation,
    SensitivityAllocation,
    SparseGPT,
    Structured,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.studies import sensitivity
from prune_callbacks.tasks import tiny_llama

ROOT = Path(__file__).parent.parent
GENERATOR = torch.Generator().manual_seed(5)
BATCHES = [torch.randint(3, 259, (2, 48), generator=GENERATOR) for _ in range(3)]
WINDOWS = torch.randint(3, 259, (5, 32), generator=GENERATOR)


def fresh():
    return tiny_llama(hidden_size=32, layers=3)


@pytest.mark.parametrize("pruner", [Wanda(Unstructured(0.7)), SparseGPT(NM(1, 4)), MRP(Unstructured(0.5))], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_layer_alone_is_as_in_a_fresh_copy(pruner, batch_size):
    model = fresh()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = sensitivity(model, BATCHES, WINDOWS, pruner, batch_size=batch_size, progress=False)
    assert len(found.increase) == 3 * 7
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    dense = perplexity(fresh(), WINDOWS, progress=False)
    assert found.dense == pytest.approx(dense, rel=1e-6)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        copy = fresh()
        report = prune_sequentially(copy, BATCHES, pruner, targets=[name], progress=False)
        assert found.increase[name] == pytest.approx(perplexity(copy, WINDOWS, progress=False) - dense, abs=2e-3)
        if report.layers[0].relative_loss is not None:
            assert found.proxy[name] == pytest.approx(report.layers[0].relative_loss, rel=1e-3)


def test_a_block_alone_is_as_in_a_fresh_copy_whose_layers_saw_dense_inputs():
    found = sensitivity(fresh(), BATCHES, WINDOWS, Wanda(Unstructured(0.7)), unit="block", progress=False)
    assert list(found.increase) == [f"model.layers.{i}" for i in range(3)]
    alone = sensitivity(fresh(), BATCHES, WINDOWS, Wanda(Unstructured(0.7)), progress=False)
    copy = fresh()
    # Layer by layer on a dense copy each, then put together: every layer's mask is that of dense inputs.
    for name in alone.increase:
        if name.startswith("model.layers.1."):
            other = fresh()
            prune_sequentially(other, BATCHES, Wanda(Unstructured(0.7)), targets=[name], progress=False)
            copy.get_submodule(name).weight.data.copy_(other.get_submodule(name).weight)
    dense = perplexity(fresh(), WINDOWS, progress=False)
    assert found.increase["model.layers.1"] == pytest.approx(
        perplexity(copy, WINDOWS, progress=False) - dense, abs=2e-3
    )
    total = sum(loss for name, loss in alone.proxy.items() if name.startswith("model.layers.1."))
    assert found.proxy["model.layers.1"] == pytest.approx(total, rel=1e-5)


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, pruner = tmp_path / "s.json", Wanda(Unstructured(0.7))
    whole = sensitivity(fresh(), BATCHES, WINDOWS, pruner, progress=False)
    module = sys.modules["prune_callbacks.studies.sensitivity"]  # the package has a function of that name
    calls = 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return perplexity(*args, **kwargs)

    monkeypatch.setattr(module, "perplexity", failing)
    model = fresh()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, BATCHES, WINDOWS, pruner, path=path, progress=False)
    # Interrupted, it leaves the model dense, and no block replaced.
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert perplexity(model, WINDOWS, progress=False) == pytest.approx(whole.dense)
    assert len(json.loads(path.read_text())["cells"]) == 8
    resumed = sensitivity(model, BATCHES, WINDOWS, pruner, path=path, progress=False)
    assert calls == 10 + 3 * 7 - 8  # the dense perplexity neither
    assert resumed.increase == pytest.approx(whole.increase)
    with pytest.raises(ValueError, match="holds results of another setting"):
        sensitivity(model, BATCHES, WINDOWS, Wanda(Unstructured(0.6)), path=path, progress=False)
    allocation = SensitivityAllocation.from_file(path, 0.3, 0.9)
    report = prune_sequentially(fresh(), BATCHES, pruner, allocation=allocation, progress=False)
    assert sum(int((~keep).sum()) for keep in report.masks.values()) == round(
        0.7 * sum(keep.numel() for keep in report.masks.values())
    )


def test_the_rank_correlation_is_spearmans():
    found = sensitivity(fresh(), BATCHES, WINDOWS, Wanda(Unstructured(0.7)), progress=False)
    wanted = spearmanr(list(found.increase.values()), list(found.proxy.values())).statistic
    assert found.rank_correlation == pytest.approx(float(wanted))


def test_the_shift_is_of_what_leaves_the_block():
    """Against a fresh copy with hooks; real tokens only."""
    ids, real = torch.cat(BATCHES), torch.ones(6, 48, dtype=torch.long)
    real[:3, 40:] = 0
    batches = [{"input_ids": ids, "attention_mask": real}]
    pruner, name = Wanda(Unstructured(0.7)), "model.layers.1.mlp.down_proj"
    found = sensitivity(fresh(), batches, WINDOWS, pruner, targets=["down_proj"], progress=False)

    def leaving(model):
        seen = []
        hook = model.model.layers[1].register_forward_hook(lambda *call: seen.append(call[2]))
        with torch.no_grad():
            model(**batches[0])
        hook.remove()
        return seen[0].double()[real.bool()]

    copy = fresh()
    dense = leaving(copy)
    prune_sequentially(copy, batches, pruner, targets=[name], progress=False)
    wanted = ((leaving(copy) - dense).square().sum(-1) / dense.square().sum(-1)).mean()
    assert 0 < found.shift[name] == pytest.approx(float(wanted), rel=1e-4)
    correlation = spearmanr(list(found.increase.values()), list(found.shift.values())).statistic
    assert found.shift_rank_correlation == pytest.approx(float(correlation))


def test_what_cannot_be_measured_is_refused(tmp_path, unchecked):
    with pytest.raises(ValueError, match='unit must be "layer" or "block", got \'model\''):
        sensitivity(fresh(), BATCHES, WINDOWS, Wanda(Unstructured(0.5)), unit="model", progress=False)
    with pytest.raises(ValueError, match="Structured removes coupled layers' units together"):
        sensitivity(fresh(), BATCHES, WINDOWS, Structured(Columns(0.25)), progress=False)
    with pytest.raises(ValueError, match="target 'nothing' matches no layer"):
        sensitivity(fresh(), BATCHES, WINDOWS, Wanda(Unstructured(0.5)), targets=["nothing"], progress=False)
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj.*NM\\(2, 5\\) needs an input size"):
        sensitivity(fresh(), BATCHES, WINDOWS, Wanda(NM(2, 5)), progress=False)
    with pytest.raises(ValueError, match="no sensitivities at .*recipe=sensitivity measures them"):
        SensitivityAllocation.from_file(tmp_path / "none.json")
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="report.json holds no sensitivities"):
        LagrangianAllocation.from_file(tmp_path / "report.json")
    blocks = tmp_path / "blocks.json"
    sensitivity(fresh(), BATCHES, WINDOWS, Wanda(Unstructured(0.5)), unit="block", path=blocks, progress=False)
    with pytest.raises(ValueError, match="holds the sensitivities of blocks"):
        SensitivityAllocation.from_file(blocks)


def test_the_recipe_and_the_allocations_that_read_its_file(tmp_path):
    folder = tmp_path / "sensitivity"
    printed = trained("smoke=true", "recipe=sensitivity", f"output_dir={folder}").output
    assert "rises by, when one layer is pruned" in " ".join(printed.split())
    assert "rank correlation (Spearman)" in printed
    assert (folder / "sensitivity.png").stat().st_size > 10_000
    written = (folder / "sensitivity.json").read_bytes()
    trained("smoke=true", "recipe=sensitivity", f"output_dir={folder}")  # nothing is measured again
    assert (folder / "sensitivity.json").read_bytes() == written
    for allocation in ("sensitivity", "lagrangian_measured"):
        where = tmp_path / allocation
        path = f"allocation.path={folder / 'sensitivity.json'}"
        trained("smoke=true", "recipe=wanda_50", f"allocation={allocation}", path, f"output_dir={where}")
        report = json.loads((where / "report.json").read_text())
        assert allocation.split("_")[0] in report["allocation"].lower()
        spread = list(report["sparsity"]["layers"].values())
        assert max(spread) - min(spread) > 0.05
        assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-6)


def test_importance_by_layer_or_block():
    weighted = LagrangianAllocation(
        reach=0.3, importance={"model.layers.0": 100.0, "model.layers.1": 1.0, "model.layers.2": 1.0}
    )
    report = prune_sequentially(fresh(), BATCHES, Wanda(Unstructured(0.6)), allocation=weighted, progress=False)
    first, *others = ([la.sparsity for la in report.layers if f"layers.{i}." in la.name] for i in range(3))
    assert max(first) < 0.35
    assert min(map(max, others)) > 0.6
    with pytest.raises(ValueError, match=r"importance has neither model.layers.1.self_attn.q_proj nor its block"):
        prune_sequentially(
            fresh(),
            BATCHES,
            Wanda(Unstructured(0.6)),
            allocation=LagrangianAllocation(importance={"model.layers.0": 1.0}),
            progress=False,
        )


def mixture():
    torch.manual_seed(0)
    config = families.MIXTURES["mixtral"]()
    config.vocab_size = 259
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def test_the_experts_of_a_tensor_are_one_layer(tmp_path):
    pruner, path, few = SparseGPT(Unstructured(0.7)), tmp_path / "s.json", 145
    model, experts = mixture(), "model.layers.0.mlp.experts.down_proj"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.warns(UserWarning, match="2 routers stay dense, first model.layers.0.mlp.gate"):
        found = sensitivity(model, BATCHES, WINDOWS, pruner, path=path, min_expert_tokens=few, progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert len(found.increase) == 2 * (4 + 2)
    copy = mixture()
    report = prune_sequentially(copy, BATCHES, pruner, targets=experts, min_expert_tokens=few, progress=False)
    assert 0 < len(report.by_magnitude) < len(report.layers) == 4
    assert found.increase[experts] == pytest.approx(perplexity(copy, WINDOWS, progress=False) - found.dense, abs=2e-3)
    # Whoever prunes by the file finds the experts in it.
    for allocation in (
        LagrangianAllocation.from_file(path, reach=0.05, points=1),
        SensitivityAllocation.from_file(path, 0.2, 0.9),
    ):
        report = prune_sequentially(mixture(), BATCHES, pruner, allocation=allocation, progress=False)
        sizes = {name: keep.numel() for name, keep in report.masks.items()}
        assert experts in sizes
        assert sum(int((~keep).sum()) for keep in report.masks.values()) == round(0.7 * sum(sizes.values()))


def test_a_block_is_pruned_with_its_experts():
    pruner = Wanda(Unstructured(0.7))
    whole = sensitivity(mixture(), BATCHES, WINDOWS, pruner, unit="block", progress=False)
    layers = sensitivity(mixture(), BATCHES, WINDOWS, pruner, progress=False)
    for block in whole.proxy:
        total = sum(loss for name, loss in layers.proxy.items() if name.startswith(f"{block}."))
        assert whole.proxy[block] == pytest.approx(total, rel=1e-5)
    assert layers.proxy["model.layers.0.mlp.experts.gate_up_proj"] > 0.1


def test_cells_of_files_from_before_the_shift_are_measured_again(tmp_path):
    path, pruner = tmp_path / "s.json", Wanda(Unstructured(0.7))
    found = sensitivity(fresh(), BATCHES, WINDOWS, pruner, unit="block", path=path, progress=False)
    written = json.loads(path.read_text())
    for cell in written["cells"].values():
        del cell["shift"]
    path.write_text(json.dumps(written))
    again = sensitivity(fresh(), BATCHES, WINDOWS, pruner, unit="block", path=path, progress=False)
    assert again.shift == pytest.approx(found.shift)
    assert all("shift" in cell for cell in json.loads(path.read_text())["cells"].values())
