"""What a user adds from outside works everywhere: a score, a pattern, a schedule, a strategy."""

import json
import re
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from fits import optimizer, trainer_of
from launch import cold, good
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import AutoModelForCausalLM

from prune_callbacks import (
    MRP,
    NM,
    OWL,
    RIA,
    Columns,
    CubicSchedule,
    Gram,
    InputNorm,
    IterativePrune,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    Pruned,
    Rows,
    SparseGPT,
    Structured,
    Unstructured,
    Wanda,
    permute_channels_,
    prune_checkpoint,
    prune_sequentially,
)
from prune_callbacks.contract import check_contract
from prune_callbacks.parallel import strategies
from prune_callbacks.parallel.plain import PlainAccess
from prune_callbacks.parallel.strategies import Served, register_strategy
from prune_callbacks.pruners import Scored
from prune_callbacks.pruners.identity import identity
from prune_callbacks.sparsity.selection import keep_largest, refuse_nan
from prune_callbacks.studies import sweep_point
from prune_callbacks.tasks import PythonDocs, TokenDataModule, tiny_llama


def ria(weight, inputs):
    size = weight.abs()
    return (size / size.sum(0) + size / size.sum(1, keepdim=True)) * inputs.squared_norm.sqrt() ** 0.5


def squared(weight):
    return weight.square()


@dataclass(frozen=True)
class Strips:
    """1 x `width` strips of a row; `round(sparsity * strips)` of them are removed, by summed score."""

    sparsity: float
    width: int = 4

    @property
    def column_group(self):
        return self.width

    def keep(self, scores, start=0):
        refuse_nan(scores)
        self.check_shape(scores.shape)
        sums = scores.unflatten(1, (-1, self.width)).sum(2)
        rows, before = len(scores), start // self.width
        gone = round(self.sparsity * rows * (before + sums.shape[1])) - round(self.sparsity * rows * before)
        return keep_largest(sums.flatten(), sums.numel() - gone).view(sums.shape).repeat_interleave(self.width, 1)

    def check_shape(self, shape):
        if shape[1] % self.width:
            raise ValueError(f"strips of {self.width} do not fit {shape[1]} input features")

    def holds(self, keep):
        strips = keep.unflatten(1, (-1, self.width))
        some = strips.any(2)
        allowed = some.numel() - round(self.sparsity * some.numel())
        return bool((some == strips.all(2)).all()) and int(some.sum()) <= allowed


@dataclass(frozen=True)
class Stairs:
    """A sparsity for each of some times."""

    at: dict = field(default_factory=lambda: {4: 0.25, 8: 0.5})
    unit: str = "step"

    @property
    def changes(self):
        return tuple(self.at)

    @property
    def target(self):
        return self.at[self.changes[-1]]

    def __call__(self, time):
        return max((s for t, s in self.at.items() if t <= time), default=0.0)


RIA_OUTSIDE = Scored(Unstructured(0.6), score=ria, statistic=InputNorm)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny_llama(hidden_size=32, layers=2)

    def training_step(self, batch):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return optimizer(self.parameters())

    def train_dataloader(self):
        ids = torch.randint(0, 200, (8, 2, 24), generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(ids, batch_size=None)


@pytest.fixture
def batches():
    return list(torch.randint(0, 200, (4, 2, 32), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def model():
    return tiny_llama(hidden_size=32, layers=2)


def float64_ria(weight, x, power):
    """The formula, element by element."""
    w, norms = weight.double().abs(), x.double().square().sum(0).sqrt()
    scores = torch.zeros_like(w)
    for i in range(len(w)):
        for j in range(len(norms)):
            scores[i, j] = (w[i, j] / w[:, j].sum() + w[i, j] / w[i].sum()) * norms[j] ** power
    return scores


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.55, per="row"), NM(2, 4), NM(1, 4), Rows(0.25), Strips(0.5)], ids=repr
)
def test_ria_is_the_papers_formula(pattern, power):
    weight, x = torch.randn(12, 16), torch.randn(40, 16) * torch.rand(16)
    inputs = InputNorm(16)
    inputs.update(x)
    pruned = RIA(pattern, power).prune(weight, inputs)
    keep = pattern.keep(float64_ria(weight, x, power))
    assert torch.equal(pruned.keep, keep)
    assert torch.equal(pruned.weight, weight * keep)
    other = pattern.keep(weight.abs() * inputs.squared_norm.sqrt())  # the control: another score is another mask
    assert not torch.equal(other, keep) or pattern == Rows(0.25)


def test_ria_of_dead_rows_and_features_is_finite():
    weight, x = torch.randn(6, 8), torch.randn(20, 8)
    weight[2], weight[:, 3], x[:, 5] = 0, 0, 0
    inputs = InputNorm(8)
    inputs.update(x)
    keep = RIA(Unstructured(0.5)).prune(weight, inputs).keep
    assert int(keep.sum()) == 24
    assert not bool(keep[:, 5].any())


def test_the_score_from_outside_is_the_pruner_of_the_package(model, batches):
    twin = tiny_llama(hidden_size=32, layers=2)
    ours = prune_sequentially(model, batches, RIA(Unstructured(0.6)), progress=False)
    theirs = prune_sequentially(twin, batches, RIA_OUTSIDE, progress=False)
    assert ours.masks == theirs.masks
    assert (
        ours.masks
        != prune_sequentially(
            tiny_llama(hidden_size=32, layers=2), batches, Wanda(Unstructured(0.6)), progress=False
        ).masks
    )


@pytest.mark.parametrize("pruner", [RIA_OUTSIDE, RIA(Unstructured(0.6))], ids=repr)
@pytest.mark.parametrize("pool", ["row", "layer"])
def test_allocations_meet_the_total_to_one_weight(model, batches, pruner, pool):
    if isinstance(pruner, Scored):
        pruner = Scored(pruner.pattern, score=ria, statistic=InputNorm, pool=pool)
    report = prune_sequentially(model, batches, pruner, allocation=OWL(reach=0.1), progress=False)
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in report.layers}
    removed = sum(round(layer.sparsity * sizes[layer.name]) for layer in report.layers)
    assert removed == round(0.6 * sum(sizes.values()))
    assert len({round(layer.sparsity, 3) for layer in report.layers}) > 1


def test_a_structure_cannot_be_allocated_and_is_told(model, batches):
    with pytest.raises(ValueError, match=r"OWL spreads the sparsity of Unstructured .* cannot spread Strips\("):
        prune_sequentially(model, batches, RIA(Strips(0.5)), allocation=OWL(), progress=False)


@pytest.mark.parametrize(
    "pruner",
    [Magnitude(Strips(0.5)), RIA(Strips(0.5)), Wanda(Strips(0.5)), MRP(Strips(0.5)), MRP(Strips(0.5), block_size=None)],
    ids=repr,
)
def test_strips_from_outside_in_one_shot_and_compensated(model, batches, pruner, tmp_path):
    net = Net()
    fitted = OneShotPrune(pruner, batches)
    trainer_of([fitted, MaskEnforcer()], tmp_path, max_steps=3).fit(net)
    fitted.report.masks.check(Strips(0.5))
    assert fitted.report.masks.violations(net.named_parameters()) == {}
    assert abs(fitted.report.sparsity - 0.5) < 1e-3


def test_compensation_by_strips_beats_none(correlated):
    weight, x = torch.randn(16, 32, dtype=torch.float64), correlated(32)
    gram = Gram(weight.shape[1])
    gram.update(x)
    assert MRP(Strips(0.5)).prune(weight, gram).loss < 0.9 * Wanda(Strips(0.5)).prune(weight, gram).loss


@pytest.mark.parametrize(
    ("pruner", "scope"),
    [
        (Scored(Unstructured(0.5), score=squared), "global"),
        (Scored(Unstructured(0.5), score=squared), "layer"),
        (Scored(Unstructured(0.5), score=squared, pool="row"), "layer"),
        (Scored(Strips(0.5), score=squared), "layer"),
        (Magnitude(Strips(0.5)), "layer"),
    ],
    ids=repr,
)
def test_rounds_follow_a_schedule_from_outside(tmp_path, pruner, scope):
    net, seen = Net(), []
    prune = IterativePrune(Stairs(), scope=scope, pruner=pruner)

    class Watch(MaskEnforcer):
        def hold(self, masks, trainer):
            super().hold(masks, trainer)
            seen.append((trainer.global_step, round(masks.sparsity(), 3)))

    trainer_of([prune, Watch()], tmp_path, max_steps=10, accumulate_grad_batches=1).fit(net)
    assert [step for step, sparsity in seen if sparsity] == [4, 8]
    assert prune.masks.sparsity() == pytest.approx(0.5, abs=2e-3)
    assert prune.masks.violations(net.named_parameters()) == {}
    if scope == "layer":
        prune.masks.check(pruner.pattern if pruner.pattern != Unstructured(0.5) else Unstructured(0.5))


def test_a_global_pool_by_a_users_magnitude_is_magnitudes(tmp_path):
    masks = []
    for pruner in (Scored(Unstructured(0.5), score=squared), Magnitude(Unstructured(0.5))):
        prune = IterativePrune(Stairs(), pruner=pruner)
        trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=9, accumulate_grad_batches=1).fit(Net())
        masks.append(prune.masks)
    assert masks[0] == masks[1]


def row_share(weight):
    return weight.abs() / weight.abs().sum(-1, keepdim=True)


def test_what_rounds_cannot_follow_is_told():
    with pytest.raises(ValueError, match="depends on a layer's other weights.*use scope='layer'"):
        IterativePrune(Stairs(), pruner=Scored(Unstructured(0.5), score=row_share))
    with pytest.raises(ValueError, match="needs no calibration; got Scored"):
        IterativePrune(Stairs(), pruner=Scored(Unstructured(0.5), score=ria, statistic=InputNorm))
    with pytest.raises(ValueError, match=r"NM\(n=2, m=4\) has one sparsity"):
        IterativePrune(Stairs(), pruner=Scored(NM(2, 4), score=squared), scope="layer")
    with pytest.raises(ValueError, match="use scope='layer'"):
        IterativePrune(Stairs(), pruner=Magnitude(Strips(0.5)))


def test_permuted_channels_keep_more_under_the_score_from_outside(batches):
    pruner = Scored(NM(2, 4), score=ria, statistic=InputNorm)
    model = tiny_llama(hidden_size=32, layers=2)
    ids = batches[0]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        permute_channels_(model, batches, NM(2, 4), progress=False)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-3, atol=1e-3)
    report = prune_sequentially(model, batches, pruner, progress=False)
    report.masks.check(NM(2, 4))


def test_streaming_ends_with_the_same_bits(tmp_path, batches):
    model = tiny_llama(hidden_size=32, layers=2)
    model.save_pretrained(tmp_path / "dense")
    for number, pruner in enumerate((RIA_OUTSIDE, RIA(Strips(0.5)))):
        prune_checkpoint(tmp_path / "dense", tmp_path / f"{number}", pruner, batches, progress=False)
        whole = tiny_llama(hidden_size=32, layers=2)
        report = prune_sequentially(whole, batches, pruner, progress=False)
        assert MaskSet.load(tmp_path / f"{number}/masks.safetensors") == report.masks
        streamed = AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}/model")
        for name, weight in whole.state_dict().items():
            assert torch.equal(streamed.state_dict()[name], weight), name


def test_a_sweep_names_the_score(tmp_path, tokenizer):
    data = TokenDataModule(
        tokenizer, PythonDocs("train"), PythonDocs("calibration"), PythonDocs("evaluation"), seq_len=32,
        calibration_windows=4, train_windows=2, evaluation_windows=2,
    )  # fmt: skip
    make = lambda: tiny_llama(hidden_size=32, layers=2)  # noqa: E731
    for sparsity in (0.3, 0.6):
        pruner = Scored(Unstructured(sparsity), score=ria, statistic=InputNorm)
        sweep_point(make, data, pruner, tmp_path, progress=False)
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert len(cells) == 2
    assert {cell["series"] for cell in cells.values()} == {
        f"Scored, unstructured, score={identity(ria)}, statistic=InputNorm"
    }
    assert not any("0x" in key for key in cells)


def test_what_the_suite_and_this_file_add_keeps_its_contract():
    for thing in (RIA_OUTSIDE, RIA(NM(2, 4)), Strips(0.5), Strips(0.3), Stairs(), Scored(Strips(0.5), score=squared)):
        check_contract(thing)
    for pattern in (Unstructured(0.5), NM(2, 4), NM(1, 4)):
        for pruner in (Magnitude(pattern), Wanda(pattern), SparseGPT(pattern), MRP(pattern), Structured(Columns(0.25))):
            check_contract(pruner)


class Careless(Magnitude):
    """Changes the weight that it is given."""

    def prune(self, weight, statistic=None):
        weight.mul_(0.5)
        return super().prune(weight, statistic)


class Loose(Magnitude):
    """Says that it keeps what it does not."""

    def prune(self, weight, statistic=None):
        pruned = super().prune(weight, statistic)
        return Pruned(weight, pruned.keep, None)


class Last(Strips):
    """Of equal scores it keeps the last."""

    def keep(self, scores, start=0):
        return super().keep(scores.flip(0, 1), start).flip(0, 1)


class Late(Stairs):
    """Says that it rises when it does not."""

    @property
    def changes(self):
        return (4, 7, 8)


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (Careless(Unstructured(0.5)), "prune changes the weight that it is given"),
        (Loose(Unstructured(0.5)), "weights that keep removes are not zero"),
        (Last(0.5), "of equal scores it does not keep the first"),
        (Late(), r"it goes from 0.25 to 0.25 at 7; changes=\[4, 7, 8\]"),
        (Magnitude, "takes a pruner such as"),
        (3, "takes a pruner .*, a pattern .* or a schedule .*, got 3"),
    ],
)
def test_broken_contracts_are_named(thing, text, unchecked):
    with pytest.raises(ValueError, match=text):
        check_contract(thing)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Scored(Unstructured(0.5), score=ria, pool="tensor"), 'pool must be "row" or "layer", got \'tensor\''),
        (lambda: Scored(Unstructured(0.5), score=3), r"score is a function of \(weight, statistic\)"),
        (lambda: Scored(0.5, score=ria), r"Scored takes a pattern such as Unstructured\(0.5\)"),
        (lambda: Scored(Unstructured(0.5), score=squared, statistic=InputNorm), "squared takes one argument"),
    ],
)
def test_bad_scores_are_refused(make, text, unchecked):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_score_of_another_shape_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"must return a score for every weight, shape \(4, 8\), got \(4,\)"):
        Scored(Unstructured(0.5), score=lambda weight: weight.sum(1)).prune(torch.randn(4, 8), None)


class Elsewhere(SingleDeviceStrategy):
    """A strategy of one's own."""


def test_a_registered_strategy_is_served_by_its_own_access(tmp_path, monkeypatch):
    monkeypatch.setattr(strategies, "_SERVED", list(strategies._SERVED))
    made = []

    def access(trainer, module, masks, ranks):
        made.append(type(trainer.strategy).__name__)
        return PlainAccess(module, masks, trainer.optimizers, ranks)

    register_strategy(Served(Elsewhere, access, problem=lambda strategy: None))
    net = Net()
    prune = OneShotPrune(Magnitude(Unstructured(0.5)))
    callbacks = [prune, MaskEnforcer()]
    trainer_of(callbacks, tmp_path, max_steps=2, strategy=Elsewhere(device="cpu")).fit(net)
    assert made == ["Elsewhere"]
    assert prune.report.masks.violations(net.named_parameters()) == {}
    register_strategy(Served(Elsewhere, access, problem=lambda strategy: "with nobody at home; come back later"))
    with pytest.raises(ValueError, match="under Elsewhere with nobody at home; come back later"):
        trainer_of(callbacks, tmp_path, max_steps=2, strategy=Elsewhere(device="cpu")).fit(Net())
    with pytest.raises(ValueError, match=r"takes Served\(strategy=..., access=...\)"):
        register_strategy(Elsewhere)


def power(exponent):
    def score(weight):
        return weight.abs() ** exponent

    return score


def test_what_a_score_captures_is_part_of_its_name():
    """Else a sweep would say "measured before" of another score, and a streamed pruning would resume with it."""
    scores = [
        power(1),
        power(-1),
        lambda w: w.abs(),
        lambda w: -w.abs(),
        partial(row_share),
        partial(torch.pow, exponent=2),
    ]
    names = [repr(Scored(Unstructured(0.5), score=score)) for score in scores]
    assert len(set(names)) == len(names)
    assert names[0] == repr(Scored(Unstructured(0.5), score=power(1)))
    assert not any("0x" in name for name in names)


def test_a_scores_name_is_the_same_in_every_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from prune_callbacks import Unstructured\n"
        "from prune_callbacks.extend import Scored\n"
        "print(Scored(Unstructured(0.5), score=lambda w: sum((lambda x: x.abs())(w) for _ in range(2))))\n"
    )
    said = {good(cold(sys.executable, script)).stdout.splitlines()[-1] for _ in range(2)}
    assert len(said) == 1


def test_the_readmes_pattern_keeps_its_contract():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "class Strips" in code)
    found = {}
    exec(block, found)
    strips = found["Strips"]
    for pattern in (strips(0.5), strips(0.3)):
        check_contract(pattern)
        scores = torch.rand(12, 16)
        assert torch.equal(pattern.keep(scores), Strips(pattern.sparsity).keep(scores))


@dataclass(frozen=True)
class Halves(Strips):
    """Does not say which columns belong together."""

    column_group = 1


@dataclass
class Half:
    sparsity: float = 0.5

    def keep(self, scores, start=0):
        return scores > 0

    def check_shape(self, shape):
        pass


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Magnitude(Half()), "takes a pattern with sparsity, keep, check_shape and holds; Half lacks holds"),
        (lambda: check_contract(Half()), "Half lacks holds"),
        (lambda: check_contract(Halves(0.5, width=8)), "say how many by the attribute column_group"),
        (lambda: IterativePrune(Stairs(unit="batches")), 'unit must be "step" or "epoch", got \'batches\''),
        (lambda: IterativePrune(Half()), "one with target, unit, changes and a call; Half lacks target, unit, changes"),
        (lambda: Scored(Unstructured(0.5), score=ria), "takes two arguments and no statistic is given"),
    ],
)
def test_what_is_missing_is_named(make, text, unchecked):
    with pytest.raises(ValueError, match=text):
        make()


def test_an_error_in_a_score_names_the_score():
    def typo(weight):
        return weight.norms

    with pytest.raises(AttributeError) as raised:
        Scored(Unstructured(0.5), score=typo).prune(torch.randn(4, 8), None)
    assert "raised by the score typo of Scored" in raised.value.__notes__


class Holder:
    def __call__(self, weight):
        return weight.abs()


def test_an_object_without_a_name_is_refused():
    with pytest.raises(ValueError, match="names an object by its address"):
        Scored(Unstructured(0.5), score=Holder())


def test_scores_with_settings_or_in_place_leave_the_model_alone():
    def with_setting(weight, exponent=0.5):
        return weight.abs_() ** exponent

    weight = torch.randn(4, 8)
    before = weight.clone()
    pruned = Scored(Unstructured(0.5), score=with_setting).prune(weight, None)
    assert torch.equal(weight, before)
    assert torch.equal(pruned.weight, before * pruned.keep)


def test_a_statistic_without_defaults_is_served():
    def made(in_features, device):
        return InputNorm(in_features, device)

    check_contract(Scored(Unstructured(0.5), score=ria, statistic=made))


class Thief(Wanda):
    """Writes into the statistic that others share."""

    def statistic(self, in_features, device=None):
        return Gram(in_features, device)

    def scores(self, weight, statistic=None):
        scores = super().scores(weight, statistic)
        statistic.matrix[0, 1] = 7
        return scores


@dataclass(frozen=True)
class Silent(Rows):
    """Removes rows and does not say so."""

    removes_rows = False


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (Thief(Unstructured(0.5)), "changes the statistic"),
        (Silent(0.5), "it removes whole rows; say so by removes_rows"),
    ],
)
def test_further_broken_contracts_are_named(thing, text, unchecked):
    with pytest.raises(ValueError, match=text):
        check_contract(thing)


def test_contracts_of_low_sparsities_and_long_schedules_are_kept():
    for thing in (Rows(0.01), Unstructured(0.0005), CubicSchedule(0.5, 0, 20000)):
        check_contract(thing)


def test_patterns_of_wide_groups_are_tried_on_given_shapes():
    with pytest.raises(ValueError, match="give others with shapes="):
        check_contract(Strips(0.5, width=64))
    check_contract(Strips(0.5, width=64), shapes=[(8, 128)])
