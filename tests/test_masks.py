import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from prune_callbacks import NM, MaskSet, Unstructured


def masks_of(*shapes, sparsity=0.5):
    return MaskSet({f"layer{i}.weight": torch.rand(shape) >= sparsity for i, shape in enumerate(shapes)})


def test_masks_rest_at_one_bit_per_weight_and_come_back(tmp_path):
    keep = {"a": torch.rand(7, 13) > 0.5, "b": torch.rand(3, 5, 2) > 0.9}
    masks = MaskSet(keep)
    assert masks.state_dict()["bits"]["a"].numel() == (7 * 13 + 7) // 8
    masks.save(tmp_path / "m.safetensors")
    loaded = MaskSet.load(tmp_path / "m.safetensors")
    for again in (masks, loaded, MaskSet.from_state_dict(masks.state_dict())):
        assert again == masks
        assert {n: m.tolist() for n, m in again.items()} == {n: m.tolist() for n, m in keep.items()}
    assert loaded != MaskSet({"a": keep["a"]})


def test_equal_masks_are_equal_files(tmp_path):
    masks = masks_of((4, 8), (3, 5))
    files = [tmp_path / str(number) for number in range(20)]  # several metadata keys would come in any order
    for file in files:
        MaskSet.from_state_dict(masks.state_dict()).save(file)
    assert len({file.read_bytes() for file in files}) == 1


def test_a_mask_cannot_be_changed_from_outside():
    masks = masks_of((4, 8))
    before = masks["layer0.weight"].clone()
    masks["layer0.weight"].fill_(False)
    assert torch.equal(masks["layer0.weight"], before)
    with pytest.raises(TypeError):
        masks["layer0.weight"] = before


def test_sparsity_counts_weights_not_layers():
    masks = MaskSet({"big": torch.zeros(9, 11, dtype=torch.bool), "small": torch.ones(1, 1, dtype=torch.bool)})
    assert masks.sparsity() == pytest.approx(99 / 100)
    assert masks.layer_sparsity() == {"big": 1.0, "small": 0.0}
    assert MaskSet({}).sparsity() == 0


def test_apply_and_violations():
    layer = nn.Linear(8, 4, bias=False)
    masks = MaskSet({"weight": Unstructured(0.5).keep(layer.weight.abs())})
    assert masks.violations(layer.named_parameters()) == {"weight": 16}
    masks.apply_(layer.named_parameters())
    assert masks.violations(layer.named_parameters()) == {}
    assert MaskSet.from_nonzero(layer.named_parameters()) == masks
    with torch.no_grad():
        layer.weight[~masks["weight"]] = torch.nan
    assert masks.violations(layer.named_parameters()) == {"weight": 16}
    masks.apply_(layer.named_parameters())
    assert layer.weight.isfinite().all()


def test_names_inside_a_containing_module_match_by_their_prefix():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    masks = MaskSet.from_nonzero({"0.weight": torch.eye(4), "1.weight": torch.eye(4)})
    outer = nn.ModuleDict({"model": inner})
    masks.apply_(outer.named_parameters())
    assert torch.equal(inner[1].weight != 0, torch.eye(4) != 0)
    assert masks.violations(outer.named_parameters()) == {}


def test_and_keeps_what_both_keep():
    first = MaskSet({"a": torch.tensor([True, True, False]), "b": torch.tensor([True])})
    second = MaskSet({"a": torch.tensor([True, False, False]), "c": torch.tensor([False])})
    both = first & second
    assert {name: mask.tolist() for name, mask in both.items()} == {
        "a": [True, False, False],
        "b": [True],
        "c": [False],
    }
    with pytest.raises(ValueError, match=r"'a' has shape \(3,\) here and \(2,\) there"):
        first & MaskSet({"a": torch.tensor([True, True])})


def test_join_takes_sets_of_different_names():
    first, second = masks_of((4, 8)), MaskSet({"b": torch.tensor([True, False])})
    assert MaskSet.join([first, second]) == MaskSet({**first, **second})
    assert MaskSet.join([]) == MaskSet({})
    with pytest.raises(ValueError, match="mask 'b' is in more than one of the sets"):
        MaskSet.join([second, second])


def test_masks_of_another_model_list_the_first_mismatches(tmp_path):
    masks = masks_of((4, 8), (4, 8), (2, 2))
    with pytest.raises(ValueError, match=r"another model: 3 of 3 do not fit, first layer0.weight: no such parameter"):
        masks.violations(nn.Linear(8, 4).named_parameters())
    wrong = {"layer0.weight": torch.ones(4, 8), "layer1.weight": torch.ones(8, 4), "layer2.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"layer1.weight: mask of shape \(4, 8\), parameter of shape \(8, 4\)"):
        masks.apply_(wrong)


def test_check_names_the_masks_without_the_pattern():
    good, bad = NM(2, 4).keep(torch.rand(4, 8)), torch.ones(4, 8, dtype=torch.bool)
    MaskSet({"good": good}).check(NM(2, 4))
    MaskSet({"conv": good.T.contiguous()}).check(NM(2, 4), input_first={"conv"})
    with pytest.raises(ValueError, match=r"1 of 2 masks do not have NM\(n=2, m=4\): bad"):
        MaskSet({"good": good, "bad": bad}).check(NM(2, 4))
    with pytest.raises(ValueError, match=r"do not have NM\(n=2, m=4\): bias"):
        MaskSet({"bias": torch.ones(4, dtype=torch.bool)}).check(NM(2, 4))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no masks file at"):
        MaskSet.load(tmp_path / "absent.safetensors")
    (tmp_path / "damaged").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        MaskSet.load(tmp_path / "damaged")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not one that MaskSet.save wrote"):
        MaskSet.load(tmp_path / "weights")
    with pytest.raises(ValueError, match="must be a bool tensor"):
        MaskSet({"a": torch.ones(2)})


def test_masks_of_wrapped_layers_fit_the_plain_model_and_the_other_way_round():
    plain = {f"layers.{i}.{n}.weight": torch.zeros(4, 8) for i in range(2) for n in ("q", "k")}
    wrapped = {name.replace(".weight", ".base_layer.weight"): value for name, value in plain.items()}
    wrapped |= {name.replace(".weight", ".lora_A.default.weight"): torch.zeros(2, 8) for name in plain}
    for ours, theirs in ((plain, wrapped), (wrapped, plain)):
        masks = MaskSet({n: torch.ones(4, 8) > 0 for n in ours if "lora" not in n})
        for prefix in ("", "module.model."):
            found = masks.places({prefix + name: value.shape for name, value in theirs.items()})
            assert set(found.values()) == {prefix + name for name in theirs if "lora" not in name}


def test_a_mask_without_a_layer_fits_a_layer_of_a_container():
    assert MaskSet({"weight": torch.ones(4, 8) > 0}).places({"0.weight": (4, 8), "0.bias": (4,)}) == {
        "weight": "0.weight"
    }


def test_layers_that_disagree_on_the_wrapper_are_another_model():
    masks = MaskSet({"mlp.weight": torch.ones(4, 8) > 0, "attn.weight": torch.ones(4, 8) > 0})
    with pytest.raises(ValueError, match="these masks belong to another model"):
        masks.places({"mlp.gate.weight": (4, 8), "attn.out.weight": (4, 8)})
    assert len(masks.places({"mlp.inner.weight": (4, 8), "attn.inner.weight": (4, 8)})) == 2  # one wrapper
