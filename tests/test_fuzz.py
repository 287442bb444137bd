"""The whole path on random models, batches, optimizers and precisions."""

import warnings

import pytest
import torch
from fits import trainer_of
from fuzz import (
    OPTIMIZERS,
    BlockPlan,
    ModelPlan,
    PrunedPlaces,
    Training,
    agree,
    batches_of,
    built,
    expected_scores,
    model_plans,
    names_of,
    trainings,
)
from hypothesis import HealthCheck, given, settings
from lightning.pytorch import LightningModule
from torch.nn import functional

from prune_callbacks import (
    CubicSchedule,
    IterativePrune,
    MaskEnforcer,
    OneShotPrune,
    Unstructured,
    Wanda,
    prune_sequentially,
)

REFUSED = {
    "padded tuple": r"a calibration batch is a tuple of 2 values \(Tensor, Tensor\), which have no names",
    "nested": r"does not fit the forward of Model: missing a required argument: 'ids'. It holds \['inputs'\]",
}
FIXED = {"database": None, "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def check_masks(plan):
    """The masks of `prune_sequentially` are those of re-running the model, or an error names what is wrong."""
    model, (batches, pairs) = built(plan), batches_of(plan)
    keys, before = list(model.state_dict()), {n: p.clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plan.batches in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[plan.batches]):
                prune_sequentially(model, batches, Wanda(Unstructured(0.5)), progress=False)
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
            return
        report = prune_sequentially(model, batches, Wanda(Unstructured(0.5)), progress=False)
    expected = {f"{name}.weight": (scores, keep) for name, scores, keep in expected_scores(built(plan), pairs)}
    every = {f"{name}.weight" for layers in names_of(model).values() for name in layers}
    assert report.masks.keys() == expected.keys()
    assert set(report.skipped) - {"head.weight"} == every - expected.keys()  # what nothing calls is named
    for name, (scores, keep) in expected.items():
        assert agree(scores, keep, report.masks[name]), name
    assert report.masks.violations(model.named_parameters()) == {}
    assert list(model.state_dict()) == keys
    others = [n for n, p in model.named_parameters() if n not in report.masks and not torch.equal(p, before[n])]
    assert not others
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@settings(max_examples=60, **FIXED)
@given(model_plans())
def test_masks_are_those_of_rerunning_the_model(plan):
    check_masks(plan)


@pytest.mark.slow
@settings(max_examples=5000, **FIXED)
@given(model_plans())
def test_masks_are_those_of_rerunning_the_model_thousands(plan):
    check_masks(plan)


class Module(LightningModule):
    """A user's module around a random model."""

    def __init__(self, training):
        super().__init__()
        self.training_plan = training
        block = BlockPlan(6, True, False, False, False, False, False, "tensor")
        plan = ModelPlan(
            6, (block,) * training.blocks, tuple(range(training.blocks)), "plain", "nothing", False, False, "tensor",
            1, training.seed, False,
        )  # fmt: skip
        self.model = built(plan).float().train()

    def training_step(self, batch):
        ids = batch if torch.is_tensor(batch) else batch[0]
        return functional.cross_entropy(self.model(ids).flatten(0, 1).float(), ids.flatten())

    def configure_optimizers(self):
        name = self.training_plan.optimizer
        # Muon takes matrices only.
        chosen = [p for p in self.parameters() if p.ndim == 2] if name == "Muon" else self.parameters()
        return getattr(torch.optim, name)(chosen, **OPTIMIZERS[name])


def check_training(plan, folder):
    """After every step, zeros in the weights and in the optimizer's state; the keys of the state as before."""
    module, enforcer = Module(plan), MaskEnforcer()
    keys = list(module.state_dict())
    dense = {name: value.clone() for name, value in module.named_parameters()}
    watch = PrunedPlaces(lambda: enforcer.masks)
    ids = torch.randint(17, (12, 2, 5), generator=torch.Generator().manual_seed(plan.seed))
    once = OneShotPrune(Wanda(Unstructured(0.4)), num_batches=2, progress=False)
    rounds = IterativePrune(CubicSchedule(0.6, 0, plan.steps - 1, initial=0.45), scope="layer")
    callbacks = {"before": [once], "rounds": [rounds], "both": [once, rounds]}[plan.prune]
    trainer = trainer_of(
        [*callbacks, enforcer, watch],
        folder,
        max_steps=plan.steps,
        accumulate_grad_batches=plan.accumulate,
        gradient_clip_val=plan.clip,
        gradient_clip_algorithm=plan.clip_by,
        precision=plan.precision,
        log_every_n_steps=100,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(ids, batch_size=None))
    assert watch.worst == 0.0
    assert trainer.global_step == plan.steps
    assert enforcer.masks.violations(module.named_parameters()) == {}
    assert enforcer.masks.sparsity() >= 0.33
    assert list(module.state_dict()) == keys
    assert any(not torch.equal(p.float(), dense[n].float()) for n, p in module.named_parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=30, **FIXED)
@given(plan=trainings)
def test_zeros_stay_zero_in_any_training(plan, folder):
    check_training(plan, folder)


@pytest.mark.slow
@settings(max_examples=3000, **FIXED)
@given(plan=trainings)
def test_zeros_stay_zero_in_any_training_thousands(plan, folder):
    check_training(plan, folder)


def test_every_optimizer_of_torch_that_takes_dense_parameters_is_there():
    found = {n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)} - {"Optimizer", "SparseAdam"}
    assert found == set(OPTIMIZERS)


def test_control_without_the_enforcer_pruned_weights_return(folder, monkeypatch):
    monkeypatch.setattr(MaskEnforcer, "_after_step", lambda *_: None)
    monkeypatch.setattr(MaskEnforcer, "on_before_optimizer_step", lambda *_: None)
    plan = Training("AdamW", "32-true", 1, None, "norm", "before", 3, 0)
    with pytest.raises(ValueError, match="pruned weights are not zero in the module"):
        check_training(plan, folder)


def test_control_a_chain_that_is_none_has_other_masks(monkeypatch):
    block = BlockPlan(6, True, False, False, False, False, False, "tensor")
    plan = ModelPlan(6, (block,) * 3, (0, 1, 2), "plain", "residual outside", False, False, "tensor", 2, 5, False)
    check_masks(plan)
    monkeypatch.setattr("fuzz.Model.forward", _as_a_chain(), raising=True)
    report = prune_sequentially(built(plan), batches_of(plan)[0], Wanda(Unstructured(0.5)), progress=False)
    monkeypatch.undo()
    expected = {f"{n}.weight": (s, k) for n, s, k in expected_scores(built(plan), batches_of(plan)[1])}
    assert not all(agree(scores, keep, report.masks[name]) for name, (scores, keep) in expected.items())


def _as_a_chain():
    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.layers:
            x = block(x)
        return self.head(x)

    return forward
