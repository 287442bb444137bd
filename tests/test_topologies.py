"""Blocks that are no chain: the masks are those of re-running the whole model, with a line that says why it ran."""

import re
import warnings

import pytest
import torch
from topologies import WIDTH, WORDS, Block, Model, made, rerun_masks
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from prune_callbacks import (
    OWL,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.calibration.capture import capture_inputs
from prune_callbacks.calibration.stand_ins import NotAChainError
from prune_callbacks.studies.sensitivity import sensitivity

PRUNER = Wanda(Unstructured(0.5))
NAMES = ["blocks.0", "blocks.1", "blocks.2"]


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return list(torch.randint(WORDS, (6, 9)).split(2))


def in_line(model, x, ids):
    for block in model.blocks:
        x = block(x)
    return x


def by_keyword(model, x, ids):
    for block in model.blocks:
        x = block(scale=0.5, x=x)
    return x


def residual_outside(model, x, ids):
    for norm, block in zip(model.norms, model.blocks, strict=True):
        x = x + block(norm(x))
    return x


def twice(model, x, ids):
    for block in [*model.blocks, *model.blocks]:
        x = block(x)
    return x


def twice_each(model, x, ids):
    for block in model.blocks:
        x = block(block(x))
    return x


def backwards(model, x, ids):
    for block in reversed(model.blocks):
        x = block(x)
    return x


def skips(model, x, ids):
    first = model.blocks[0](x)
    return model.blocks[2](model.blocks[1](first) + first)


def skip_as_an_argument(model, x, ids):
    first = model.blocks[0](x)
    second = model.blocks[1](first, scale=first.mean())
    return model.blocks[2](second)


def scaled_in_between(model, x, ids):
    for block in model.blocks:
        x = block(x) * 1.5
    return x


def side_by_side(model, x, ids):
    return sum(block(x) for block in model.blocks)


def hooks_between(model, x, ids):
    for block in model.blocks:
        x = torch.tanh(block(x))
    return x


def by_forward(model, x, ids):
    for block in model.blocks:
        x = block.forward(x)
    return x


def depth_by_content(model, x, ids):
    for block in model.blocks[: 2 + int(ids[0, 0]) % 2]:
        x = block(x)
    return x


class Remembering(Block):
    """Leaves its output in a place that the next block reads."""

    place: dict

    def forward(self, x, scale=1.0):
        before = self.place.get("x", 0.0)
        self.place["x"] = super().forward(x, scale)
        return self.place["x"] + before


class Storing(Block):
    """Writes into a dictionary that all blocks get."""

    def forward(self, x, store):
        store[len(store)] = super().forward(x)
        return store[len(store) - 1] + store[0]


class Pair(Block):
    """Returns the hidden states and something for the next block."""

    def forward(self, x, carried=None):
        y = super().forward(x if carried is None else x + carried)
        return y, y - x


def remembering():
    place = {}
    blocks = [Remembering() for _ in range(3)]
    for block in blocks:
        block.place = place
    return blocks


def one_store(model, x, ids):
    store = {}
    for block in model.blocks:
        x = block(x, store)
    return x


def forgetting(model, x, ids):
    model.blocks[0].place.clear()
    return in_line(model, x, ids)


def pairs(model, x, ids):
    carried = None
    for block in model.blocks:
        x, carried = block(x, carried)
    return x


def pairs_dropped(model, x, ids):
    for block in model.blocks:
        x = block(x)[0]
    return x


CHAINS = {"in_line": (in_line, None), "by_keyword": (by_keyword, None), "by_forward": (by_forward, None)}
CHAINS |= {"pairs_dropped": (pairs_dropped, lambda: [Pair() for _ in range(3)])}
OTHERS = {
    "residual_outside": (residual_outside, None, "what enters block 1 is not what block 0 returned"),
    "twice": (twice, None, "it calls block 0 twice"),
    "twice_each": (twice_each, None, "it calls block 0 twice"),
    "backwards": (backwards, None, "it calls block 1 after block 2"),
    "skips": (skips, None, "what enters block 2 is not what block 1 returned"),
    "skip_as_an_argument": (skip_as_an_argument, None, "block 1 gets more of the blocks before it than"),
    "scaled_in_between": (scaled_in_between, None, "what enters block 1 is not what"),
    "side_by_side": (side_by_side, None, "what enters block 1 is not what"),
    "hooks_between": (hooks_between, None, "what enters block 1 is not what"),
    "depth_by_content": (depth_by_content, None, "it calls other blocks in one batch than in another"),
    "a_hidden_place": (forgetting, remembering, "does not compute what it computes in the whole model"),
    "one_store": (one_store, lambda: [Storing() for _ in range(3)], "blocks 0 and 1 get the same dict"),
    "pairs": (pairs, lambda: [Pair() for _ in range(3)], "block 1 gets more of the blocks before it than"),
}


def pruned(model, batches, **settings):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report = prune_sequentially(model, batches, PRUNER, progress=False, **settings)
    return report, [str(w.message) for w in heard if "runs again" in str(w.message)]


def assert_masks(report, expected):
    assert report.masks.keys() == expected.keys()
    for name, keep in expected.items():
        assert torch.equal(report.masks[name], keep), name


@pytest.mark.parametrize("case", CHAINS)
def test_blocks_in_a_chain_run_once(case, batches):
    walk, blocks = CHAINS[case]
    model = made(walk, blocks and blocks())
    expected = rerun_masks(model, NAMES, batches)
    passes = []
    model.embedding.register_forward_pre_hook(lambda *_: passes.append(1))
    report, reruns = pruned(model, batches)
    assert_masks(report, expected)
    assert not reruns
    # Each batch once, the first twice, and a short look at whether the chain computes what the model does.
    assert len(passes) == len(batches) + 1 + 4


@pytest.mark.parametrize("case", OTHERS)
def test_other_blocks_get_the_masks_of_running_the_model_again(case, batches):
    walk, blocks, reason = OTHERS[case]
    model = made(walk, blocks and blocks())
    order = NAMES[::-1] if case == "backwards" else NAMES
    for number, batch in enumerate(batches):
        batch[0, 0] = number  # tells two depths apart
    expected = rerun_masks(model, order, batches)
    report, reruns = pruned(model, batches)
    (told,) = reruns
    assert re.search(rf"^Model: .*{reason}.*\. So the whole model runs again for every block, which is slower$", told)
    assert_masks(report, expected)


def test_control_as_a_chain_the_masks_would_be_others(batches):
    model = made(residual_outside)
    expected = rerun_masks(model, NAMES, batches)
    report, _ = pruned(made(lambda model, x, ids: in_line(model, model.norms[0](x), ids)), batches)
    assert torch.equal(report.masks["blocks.0.up.weight"], expected["blocks.0.up.weight"])
    assert not torch.equal(report.masks["blocks.1.up.weight"], expected["blocks.1.up.weight"])


def test_shared_blocks_and_layers_count_all_their_calls(batches):
    shared = Block()
    model = made(in_line, [shared, Block(), shared])
    expected = rerun_masks(model, NAMES[:2], batches)
    report, reruns = pruned(model, batches)
    assert "it calls block 0 twice" in reruns[0]
    assert_masks(report, expected)


def test_blocks_that_are_never_called_stay_dense_and_are_named(batches):
    model = made(lambda model, x, ids: model.blocks[2](model.blocks[0](x)))
    dense = model.blocks[1].up.weight.clone()
    expected = rerun_masks(model, NAMES, batches)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report = prune_sequentially(model, batches, PRUNER, progress=False)
    assert_masks(report, expected)
    assert torch.equal(model.blocks[1].up.weight, dense)
    assert set(report.skipped) == {"blocks.1.up.weight", "blocks.1.down.weight", "head.weight"}
    told = [str(w.message) for w in heard]
    assert len([text for text in told if "blocks.1 stays dense: its forward was never called" in text]) == 1
    assert not any("runs again" in text for text in told)


@pytest.mark.parametrize("allocation", [None, OWL()])
def test_allocations_measure_whole_models_too(allocation, batches):
    model = made(residual_outside)
    report, reruns = pruned(model, batches, allocation=allocation)
    assert len(reruns) == 1
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.masks.violations(model.named_parameters()) == {}


def test_what_needs_a_chain_says_so(batches):
    model = made(residual_outside)
    with pytest.raises(ValueError, match=r"sensitivity needs decoder blocks that form a chain.*In Model they do not"):
        sensitivity(model, batches, torch.randint(WORDS, (2, 9)), PRUNER, progress=False)
    with pytest.raises(NotAChainError, match="what enters block 1"):
        capture_inputs(model, list(model.blocks), batches)
    assert all("forward" not in vars(block) for block in model.blocks)


def test_errors_of_the_model_itself_are_not_taken_for_a_topology(batches):
    def broken(model, x, ids):
        raise RuntimeError("no such table")

    with pytest.raises(RuntimeError, match="no such table"):
        pruned(made(broken), batches)


class InPlace(Block):
    """Adds to its input in place."""

    def forward(self, x, scale=1.0):
        x += scale * self.down(torch.tanh(self.up(x)))
        return x


@pytest.mark.parametrize("places", [(0,), (1, 2)])
def test_blocks_that_write_into_their_inputs_are_no_chain(places, batches):
    model = made(in_line, [InPlace() if place in places else Block() for place in range(3)])
    expected = rerun_masks(model, NAMES, batches)
    report, reruns = pruned(model, batches)
    assert f"block {places[0]} writes into its inputs" in reruns[0]
    assert_masks(report, expected)


@pytest.mark.parametrize("first", [True, False])
def test_an_argument_that_is_there_for_some_outputs_only_is_seen(first, batches):
    def sometimes(model, x, ids):
        for block in model.blocks:
            x = block(x, 2.0 if bool(x.sum() > 0) is first else 1.0)
        return x

    class Taking(Block):
        def forward(self, x, scale):
            return super().forward(x, scale)

    def tensor_or_none(model, x, ids):
        for block in model.blocks:
            x = block(x, torch.ones(()) if bool(x.sum() > 0) is first else None)
        return x

    class Optional(Block):
        def forward(self, x, scale=None):
            return super().forward(x, 0.5 if scale is None else scale)

    for walk, kind in ((sometimes, Taking), (tensor_or_none, Optional)):
        model = made(walk, [kind() for _ in range(3)])
        expected = rerun_masks(model, NAMES, batches)
        report, _ = pruned(model, batches)
        assert_masks(report, expected)


def test_a_model_that_takes_one_length_and_one_of_features(batches):
    class Fixed(Model):
        def __init__(self):
            super().__init__(in_line)
            self.places = nn.Parameter(torch.randn(96, WIDTH))

        def forward(self, ids):
            return self.head(self.walk(self, self.embedding(ids) + self.places, ids))

    torch.manual_seed(0)
    model, windows = Fixed().double().eval(), list(torch.randint(WORDS, (4, 96)).split(2))
    expected = rerun_masks(model, NAMES, windows)
    report, reruns = pruned(model, windows)
    assert_masks(report, expected)
    assert not reruns

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.blocks = nn.Linear(128, WIDTH), nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            x = self.enter(x)
            for block in self.blocks:
                x = block(x)
            return x

    rows = list(torch.randn(80, 128).double().split(40))
    model = Features().double().eval()
    expected = rerun_masks(model, ["enter", *NAMES], rows)
    report, reruns = pruned(model, rows)
    assert_masks(report, expected)
    assert not reruns


def test_of_several_lists_the_one_that_is_no_chain_is_named():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    ids = torch.randint(1, 99, (4, 7))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        prune_sequentially(t5, [{"input_ids": ids, "labels": ids}], PRUNER, progress=False)
    told = [str(w.message).partition(" gets")[0] for w in heard if "runs again" in str(w.message)]
    assert told == [f"T5ForConditionalGeneration: in {stack}.block, block 1" for stack in ("encoder", "decoder")]
