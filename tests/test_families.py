"""Every supported family of dense models: pruned block by block as if the whole model were run again each time."""

import copy

import families
import pytest
import torch
import transformers as hf

from prune_callbacks import MRP, NM, Magnitude, SparseGPT, Unstructured, Wanda, prune_sequentially
from prune_callbacks.anatomy.blocks import find_blocks

PRUNERS = {
    "magnitude": Magnitude(NM(2, 4)),
    "wanda": Wanda(Unstructured(0.5)),
    "wanda-1:4": Wanda(NM(1, 4)),
    "sparsegpt": SparseGPT(NM(2, 4)),
    "sparsegpt-unstructured": SparseGPT(Unstructured(0.5)),
    "mrp": MRP(NM(2, 4)),
    "mrp-unstructured": MRP(Unstructured(0.5)),
    "magnitude-unstructured": Magnitude(Unstructured(0.5)),
}


def model_of(family):
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(families.FAMILIES[family]()).eval().double()
    with torch.no_grad():  # biases and norms as trained ones are: not all zeros and ones
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def batches():
    return list(torch.randint(3, 61, (8, 12)).split(4))


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
def test_pruning_equals_rerunning_the_whole_model(family, pruner, batches):
    model = model_of(family)
    reference, dense = copy.deepcopy(model), copy.deepcopy(model)
    report = prune_sequentially(model, batches, pruner, progress=False)
    blocks = [name for name, _ in find_blocks(model)]
    families.prune_by_rerunning(reference, blocks, batches, pruner)
    targets = [f"{name}.weight" for block in blocks for name in families.layers_in(model, block)]
    assert list(report.masks) == targets
    # OPT's projections are outside of the blocks; depthwise convolutions, as Mamba's, have few weights.
    assert all("project_" in layer or layer.endswith("conv1d.weight") for layer in report.skipped)
    report.masks.check(pruner.pattern, input_first=report.input_first)
    assert report.masks.violations(model.named_parameters()) == {}
    assert list(model.state_dict()) == list(dense.state_dict())
    for name, parameter in model.named_parameters():
        if name in targets:
            expected = reference.get_parameter(name)
            torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            assert not torch.equal(parameter, dense.get_parameter(name))
        else:  # embeddings, the head, norms, biases, convolutions, state matrices
            assert torch.equal(parameter, dense.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llama", "opt-350m", "falcon-40b", "mamba"])
def test_control_on_the_dense_models_inputs_another_model_comes_out(family, batches):
    model = model_of(family)
    reference = copy.deepcopy(model)
    prune_sequentially(model, batches, SparseGPT(NM(2, 4)), progress=False)
    blocks = [name for name, _ in find_blocks(model)]
    families.prune_by_rerunning(reference, blocks[::-1], batches, SparseGPT(NM(2, 4)))  # the last block first
    for name in families.layers_in(model, blocks[-1]):
        difference = (model.get_submodule(name).weight - reference.get_submodule(name).weight).abs().max()
        assert difference > 1e-5, name


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_pruned_model_is_saved_and_loaded_by_transformers(family, batches, tmp_path):
    model = model_of(family)
    report = prune_sequentially(model, batches, Wanda(NM(1, 4)), progress=False)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert report.masks.violations(again.named_parameters()) == {}
    assert report.sparsity == pytest.approx(0.75)
    with torch.no_grad():
        assert torch.equal(again(batches[0]).logits, model(batches[0]).logits)
