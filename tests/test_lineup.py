"""Who stands among the callbacks, under which strategy, and who holds the masked parameters."""

from types import SimpleNamespace

import pytest
import torch
from fits import optimizer, trainer_of
from lightning.pytorch import LightningModule
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from prune_callbacks import (
    NM,
    CubicSchedule,
    IterativePrune,
    LoRARecovery,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    QuantizeWeights,
    RunReport,
    SparsityMonitor,
    Unstructured,
    callbacks,
)
from prune_callbacks.callbacks.lineup import Lineup, access_to
from prune_callbacks.callbacks.order import AVERAGES, RULES
from prune_callbacks.parallel.access import ParamAccess
from prune_callbacks.tasks import tiny_llama


class Pair(LightningModule):
    """A student behind its frozen teacher, of one architecture."""

    def __init__(self):
        super().__init__()
        self.teacher = tiny_llama(seed=1, hidden_size=32, layers=2).requires_grad_(False)
        self.student = tiny_llama(hidden_size=32, layers=2)

    def training_step(self, batch):
        return self.student(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return optimizer(self.student.parameters())

    def train_dataloader(self):
        ids = torch.randint(0, 200, (8, 2, 24), generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(ids, batch_size=None)


@pytest.fixture
def accesses(monkeypatch):
    """The accesses to parameters that are made."""
    made, original = [], ParamAccess.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ParamAccess, "__init__", spy)
    return made


def test_the_enforcer_holds_the_only_access(tmp_path, accesses):
    pair, before = Pair(), Pair().teacher.state_dict()
    prune = OneShotPrune(Magnitude(NM(2, 4)), progress=False)
    monitor, enforcer = SparsityMonitor(tmp_path, every_n_steps=1), MaskEnforcer()
    trainer_of([prune, monitor, enforcer], tmp_path, max_steps=4, accumulate_grad_batches=1).fit(pair)
    assert len(monitor.history) > 3
    assert len(accesses) == 1
    assert prune.report.masks.violations(pair.student.named_parameters()) == {}
    assert all(torch.equal(value, before[name]) for name, value in pair.teacher.state_dict().items())


def test_rounds_take_the_enforcers_access_too(tmp_path, accesses):
    prune = IterativePrune(CubicSchedule(0.6, 0, 4), pruner=Magnitude(Unstructured(0.6)))
    monitor = SparsityMonitor(tmp_path, every_n_steps=1)
    trainer_of([prune, monitor, MaskEnforcer()], tmp_path, max_steps=6, accumulate_grad_batches=1).fit(Pair())
    # One for the zeros that the model may have, one when training starts, one for each of four changes.
    assert len(accesses) == 6
    assert len(monitor.history) >= 5


def test_masks_are_bound_to_the_model_that_they_are_for_by_the_module(tmp_path):
    pair = Pair()
    prune = OneShotPrune(Magnitude(NM(2, 4)), progress=False)
    trainer = trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=1)
    trainer.fit(pair)
    access = access_to(trainer, prune.report.masks)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert access._parameter(name) is pair.student.get_parameter(name)
    pair.teacher.requires_grad_(True)  # the control: with two trained models nobody can tell
    with pytest.raises(ValueError, match=r"holds 2 language models, \['teacher', 'student'\]"):
        access_to(trainer, prune.report.masks)


@pytest.mark.parametrize("make", [LoRARecovery, lambda: QuantizeWeights("out")], ids=["lora", "quantize"])
def test_what_needs_whole_weights_is_refused_under_fsdp1(make):
    callback = make()
    trainer = SimpleNamespace(strategy=object.__new__(FSDPStrategy), callbacks=[callback])
    with pytest.raises(ValueError, match="does not work under FSDPStrategy; use one device"):
        callback.setup(trainer, None, "fit")
    trainer.strategy = object.__new__(SingleDeviceStrategy)  # the control
    with pytest.raises(Exception, match="^(?!.*does not work under)"):
        callback.setup(trainer, None, "fit")


def test_every_name_in_the_table_is_a_callback():
    named = {rule.who for rule in RULES} | {kind for rule in RULES for kind in (*rule.kinds, *rule.beside)}
    assert named <= {*callbacks.__all__, *AVERAGES}
    assert all(hasattr(lightning_callbacks, name) for name in AVERAGES)
    assert all(
        "{" not in rule.text or "{found}" in rule.text or "{all}" in rule.text or "{wrong}" in rule.text
        for rule in RULES
    )


def test_a_subclass_is_its_base_class():
    class Mine(OneShotPrune):
        pass

    mine, enforcer = Mine(Magnitude(NM(2, 4))), MaskEnforcer()
    lineup = Lineup(SimpleNamespace(callbacks=[mine, enforcer], strategy=None))
    assert lineup.first(OneShotPrune) is mine
    assert lineup._named(("OneShotPrune",)) == ["Mine"]
    assert lineup.after(mine).names() == ["MaskEnforcer"]
    assert lineup.before(mine).names() == []


def test_masks_of_two_trained_models_by_their_full_names_are_bound(tmp_path):
    pair = Pair()
    pair.teacher.requires_grad_(True)
    trainer = trainer_of([], tmp_path, max_steps=1)
    trainer.fit(pair)
    shapes = {name: p.shape for name, p in pair.named_parameters() if name.endswith("q_proj.weight")}
    access = access_to(trainer, MaskSet.all_kept(shapes))
    assert len(shapes) == 4
    for name in shapes:
        assert access._parameter(name) is pair.get_parameter(name)


def test_a_wrong_order_is_known_before_anything_is_pruned(tmp_path):
    pair = Pair()
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    callbacks = [OneShotPrune(Magnitude(NM(2, 4)), progress=False), RunReport(tmp_path / "run"), MaskEnforcer()]
    with pytest.raises(ValueError, match="RunReport needs one OneShotPrune or IterativePrune"):
        trainer_of(callbacks, tmp_path, max_steps=1).fit(pair)
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
