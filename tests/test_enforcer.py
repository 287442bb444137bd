"""MaskEnforcer in real fits: every guarantee beside a run without it, in which the zeros come back."""

import warnings
from pathlib import Path

import pytest
import torch
from fits import optimizer, trainer_of
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from transformers import BatchEncoding

from prune_callbacks import (
    MRP,
    NM,
    CausalLM,
    ConstantSchedule,
    IterativePrune,
    LoRARecovery,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    SparseGPT,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.callbacks.lightning_internals import resumed_checkpoint
from prune_callbacks.tasks import tiny_llama

STEPS = 20


class Watch(Callback):
    """Looks at weights and moments right after every optimizer step, before any callback."""

    def __init__(self, masks=None):
        self.masks = masks
        self.worst_weight = self.worst_moment = 0.0
        self.steps = 0

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.look)
        self.module = pl_module
        if self.masks is None:
            self.masks = next(c.report.masks for c in trainer.callbacks if isinstance(c, OneShotPrune))

    def look(self, optimizer, args, kwargs):
        self.steps += 1
        for name, parameter in self.masks.matching(self.module.named_parameters()).items():
            gone = ~self.masks[name]
            self.worst_weight = max(self.worst_weight, float(parameter.detach()[gone].abs().max()))
            for value in optimizer.state[parameter].values():
                if value.shape == parameter.shape:
                    self.worst_moment = max(self.worst_moment, float(value[gone].abs().max()))


def batches(count=STEPS * 2, size=2):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 200, (count * size, 16), generator=generator).split(size)


def loader():
    return torch.utils.data.DataLoader(torch.cat(list(batches())), batch_size=2)


def fit(callbacks, tmp_path, module=None, **settings):
    module = module or CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
    trainer = trainer_of(callbacks, tmp_path, **settings)
    trainer.fit(module, loader(), ckpt_path=settings.pop("ckpt_path", None))
    return trainer, module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("pruner", [Magnitude(Unstructured(0.5)), SparseGPT(NM(1, 4))], ids=["magnitude", "sparsegpt"])
def test_zeros_stay_zero_through_every_step(tmp_path, precision, pruner):
    watch, keys = Watch(), set(CausalLM(tiny_llama(hidden_size=32, layers=2)).state_dict())
    one_shot = OneShotPrune(pruner, batches(2), progress=False)
    trainer, module = fit([one_shot, MaskEnforcer(), watch], tmp_path, precision=precision)
    assert watch.steps == trainer.global_step == STEPS
    assert watch.worst_weight == 0.0
    assert watch.worst_moment == 0.0
    assert one_shot.report.masks.violations(module.named_parameters()) == {}
    assert trainer.callback_metrics["violations"] == 0
    assert trainer.callback_metrics["sparsity"] == pytest.approx(pruner.pattern.sparsity)
    assert set(module.state_dict()) == keys


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_control_without_the_enforcer_the_zeros_come_back(tmp_path, precision):
    watch, one_shot = Watch(), OneShotPrune(Magnitude(Unstructured(0.5)), batches(2), progress=False)
    with pytest.warns(UserWarning, match="the zeros will not last"):
        trainer, _ = fit([one_shot, watch], tmp_path, precision=precision)
    assert watch.worst_weight > 1e-3
    assert watch.worst_moment > 0
    assert trainer.callback_metrics["violations"] > 1000


class LateMasks(Callback):
    """Trains dense for ten steps, so that momentum exists, then starts a second fit from that optimizer's state."""

    def __init__(self, state):
        self.state = state

    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].load_state_dict(self.state)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("enforced", [True, False])
def test_momentum_that_predates_the_mask(tmp_path, enforced, precision):
    """A frozen gradient: only old momentum can move pruned weights. With the enforcer it is gone."""
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
    dense = trainer_of([], tmp_path, max_steps=10)
    dense.fit(module, loader())
    state = dense.optimizers[0].state_dict()
    names = [n for n, _ in module.named_parameters() if "proj" in n]
    masks = MaskSet({n: module.get_parameter(n).abs() > module.get_parameter(n).abs().median() for n in names})
    masks.apply_(module.named_parameters())
    watch = Watch(masks)
    callbacks = [LateMasks(state), watch] + ([MaskEnforcer(masks)] if enforced else [])
    fit(callbacks, tmp_path, module, precision=precision)
    if enforced:
        assert (watch.worst_weight, watch.worst_moment) == (0.0, 0.0)
    else:
        assert watch.worst_weight > 1e-2
        assert watch.worst_moment > 1e-4


def test_pruned_gradients_do_not_enter_the_clipping_norm(tmp_path):
    """Survivors move as if the pruned weights did not exist: by the norm of the survivors' gradients."""

    class Norm(Callback):
        def __init__(self):
            self.norms = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    norms = {}
    for enforced in (True, False):
        norm = Norm()
        one_shot = OneShotPrune(Magnitude(Unstructured(0.5)), batches(2), progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit([one_shot] + [MaskEnforcer()] * enforced + [norm], tmp_path, max_steps=1)
        norms[enforced] = norm.norms[0]
    assert norms[True] < 0.95 * norms[False]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimizers(tmp_path, make):
    extra = {"momentum": 0.9} if make is not torch.optim.Adagrad else {}
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), lambda p: make(p, lr=1e-2, weight_decay=0.1, **extra))
    watch = Watch()
    fit([OneShotPrune(Magnitude(NM(2, 4)), batches(2), progress=False), MaskEnforcer(), watch], tmp_path, module)
    assert (watch.steps, watch.worst_weight, watch.worst_moment) == (STEPS, 0.0, 0.0)


def test_manual_optimization(tmp_path):
    class Manual(CausalLM):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):  # two optimizer steps a batch
                self.optimizers().zero_grad()
                self.manual_backward(self.model(input_ids=batch, labels=batch).loss)
                self.optimizers().step()

    watch = Watch()
    module = Manual(tiny_llama(hidden_size=32, layers=2), optimizer)
    callbacks = [OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer(), watch]
    fit(callbacks, tmp_path, module, gradient_clip_val=None, accumulate_grad_batches=1)
    assert (watch.steps, watch.worst_weight) == (STEPS, 0.0)


def test_masks_from_a_file_and_from_zeros(tmp_path):
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
    masks = MaskSet({f"{n}": NM(2, 4).keep(p.abs()) for n, p in module.model.named_parameters() if "proj" in n})
    masks.save(tmp_path / "masks.safetensors")
    watch, enforcer = Watch(masks), MaskEnforcer(tmp_path / "masks.safetensors")
    fit([enforcer, watch], tmp_path, module)  # masks are put on the dense weights when training starts
    assert (watch.worst_weight, watch.worst_moment) == (0.0, 0.0)
    assert enforcer.masks == masks
    from_zeros = MaskEnforcer()
    fit([from_zeros], tmp_path, module)
    assert from_zeros.masks == masks
    assert masks.violations(module.named_parameters()) == {}


def test_loggers_get_sparsity_and_violations(tmp_path):
    logger = CSVLogger(tmp_path)
    one_shot = OneShotPrune(Magnitude(NM(2, 4)), progress=False)
    fit([one_shot, MaskEnforcer()], tmp_path, max_steps=4, logger=logger, log_every_n_steps=2)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    logged = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
    steps = {int(row["step"]): row for row in logged if row["violations"]}
    assert set(steps) >= {0, 1, 3}
    assert {float(row["violations"]) for row in steps.values()} == {0.0}
    assert {float(row["sparsity"]) for row in steps.values()} == {0.5}


def test_one_shot_comes_before_the_file(tmp_path):
    masks = MaskSet({"model.layers.0.mlp.up_proj.weight": torch.ones(96, 32, dtype=torch.bool)})
    one_shot, enforcer = OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer(masks)
    with pytest.warns(UserWarning, match="uses the masks of OneShotPrune"):
        fit([one_shot, enforcer], tmp_path, max_steps=1)
    assert enforcer.masks == one_shot.report.masks


def test_bad_masks_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="MaskEnforcer found no masks: there is no OneShotPrune"):
        fit([MaskEnforcer()], tmp_path)
    with pytest.raises(ValueError, match="no masks file at"):
        fit([MaskEnforcer(tmp_path / "absent")], tmp_path)
    other = MaskSet({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="these masks belong to another model: 1 of 1 do not fit"):
        fit([MaskEnforcer(other)], tmp_path)


def test_strategies_that_shard_are_refused_by_name(tmp_path, tiny):
    trainer = trainer_of([], tmp_path)
    trainer.strategy.__class__ = FSDPStrategy  # cannot be built on a CPU
    for callback in (MaskEnforcer(), OneShotPrune(Magnitude(NM(2, 4)))):
        with pytest.raises(ValueError, match=r'cannot hold masks under FSDPStrategy.*use one device or strategy="ddp"'):
            callback.setup(trainer, CausalLM(tiny), "fit")


class Boring(LightningModule):
    """A user's own module, not ours."""

    def __init__(self):
        super().__init__()
        self.net = tiny_llama(hidden_size=32, layers=2)

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return optimizer(self.parameters())


def test_a_users_own_module_calibrated_on_its_training_data(tmp_path):
    data = torch.utils.data.TensorDataset(torch.cat(list(batches())))
    watch, module = Watch(), Boring()
    trainer = trainer_of(
        [OneShotPrune(Wanda(NM(2, 4)), num_batches=3, progress=False), MaskEnforcer(), watch], tmp_path
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, 2))
    assert (watch.worst_weight, watch.worst_moment) == (0.0, 0.0)


def test_too_few_calibration_batches_and_strange_ones(tmp_path):
    with pytest.raises(ValueError, match="asked for 5 calibration batches, there are 2"):
        fit([OneShotPrune(Wanda(NM(2, 4)), batches(2), num_batches=5), MaskEnforcer()], tmp_path)
    with pytest.raises(ValueError, match="a calibration batch must be token ids"):
        fit([OneShotPrune(Wanda(NM(2, 4)), ["text"]), MaskEnforcer()], tmp_path)
    with pytest.raises(ValueError, match="num_batches must be at least 1"):
        OneShotPrune(Wanda(NM(2, 4)), num_batches=0)


class Draws(Magnitude):
    """As a pruner may that chooses weights by chance."""

    def prune(self, weight, statistic):
        torch.rand(3)
        return super().prune(weight, statistic)


def test_pruning_does_not_change_what_training_draws(tmp_path):
    weights = []
    for pruner in (Magnitude(NM(2, 4)), MRP(NM(2, 4)), Draws(NM(2, 4))):
        torch.manual_seed(3)
        data = torch.utils.data.DataLoader(torch.cat(list(batches())), 2, shuffle=True)
        drawn = []

        class Record(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, drawn=drawn):
                drawn.append(batch.clone())

        module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
        callbacks = [OneShotPrune(pruner, num_batches=4, progress=False), MaskEnforcer(), Record()]
        trainer_of(callbacks, tmp_path, max_steps=2).fit(module, data)
        weights.append(torch.cat(drawn))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_resuming_starts_from_the_checkpoints_masks(tmp_path, monkeypatch):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=8, save_top_k=-1)
    first = OneShotPrune(Wanda(NM(2, 4)), batches(2), progress=False)
    fit([first, MaskEnforcer(), checkpoint], tmp_path, max_steps=8, enable_checkpointing=True)
    again, enforcer = OneShotPrune(Magnitude(Unstructured(0.9)), batches(2), progress=False), MaskEnforcer()
    watch = Watch(first.report.masks)
    monkeypatch.setattr("prune_callbacks.callbacks.prune_module.prune_sequentially", None)  # must not be called
    module = CausalLM(tiny_llama(seed=99, hidden_size=32, layers=2), optimizer)
    trainer = trainer_of([again, enforcer, watch], tmp_path)
    trainer.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert watch.steps == STEPS - 8
    assert enforcer.masks == again.report.masks == first.report.masks
    assert again.report.layers == first.report.layers
    assert (watch.worst_weight, watch.worst_moment) == (0.0, 0.0)


def test_a_checkpoint_from_before_pruning_is_refused(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="dense", every_n_train_steps=2, save_top_k=-1)
    fit([checkpoint], tmp_path, max_steps=2, enable_checkpointing=True)
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
    trainer = trainer_of([OneShotPrune(Wanda(NM(2, 4)), batches(2))], tmp_path)
    with pytest.raises(ValueError, match="holds no pruning result, so it was written before pruning"):
        trainer.fit(module, loader(), ckpt_path=tmp_path / "dense.ckpt")


def test_a_second_fit_prunes_again(tmp_path):
    one_shot = OneShotPrune(Magnitude(NM(2, 4)), progress=False)
    fit([one_shot, MaskEnforcer()], tmp_path, max_steps=1)
    _, module = fit(
        [one_shot, MaskEnforcer()], tmp_path, CausalLM(tiny_llama(seed=4, hidden_size=32, layers=2)), max_steps=1
    )
    assert one_shot.report.masks.violations(module.named_parameters()) == {}


def test_a_fit_that_failed_leaves_nothing_behind(tmp_path):
    """Lightning calls no teardown after an exception: the next fit must not use the masks of the failed one."""
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=2, save_top_k=-1)
    one_shot, enforcer = OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer()
    fit([one_shot, enforcer, checkpoint], tmp_path, max_steps=2, enable_checkpointing=True)

    class Fails(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise RuntimeError("on purpose")

    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer_of([one_shot, enforcer, Fails()], tmp_path).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    one_shot.pruner = Magnitude(Unstructured(0.9))
    fit([one_shot, enforcer], tmp_path, max_steps=1)
    assert enforcer.masks == one_shot.report.masks
    assert enforcer.masks.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_batch_encodings_and_fits_without_logging(tmp_path):
    encoding = BatchEncoding({"input_ids": next(iter(batches())), "token_type_ids": torch.zeros(2, 16)})
    one_shot = OneShotPrune(Wanda(NM(2, 4)), [encoding], progress=False)
    _, module = fit([one_shot, MaskEnforcer()], tmp_path, max_steps=1, log_every_n_steps=0)
    assert one_shot.report.masks.violations(module.named_parameters()) == {}


def test_a_loader_with_its_own_generator_draws_the_same(tmp_path):
    drawn = []

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            drawn.append(batch.clone())

    for callbacks in ([], [OneShotPrune(Wanda(NM(2, 4)), num_batches=2, progress=False), MaskEnforcer()]):
        generator = torch.Generator().manual_seed(1)
        data = torch.utils.data.DataLoader(torch.cat(list(batches())), 2, shuffle=True, generator=generator)
        module = CausalLM(tiny_llama(hidden_size=32, layers=2))
        trainer_of([*callbacks, Record()], tmp_path, max_steps=1).fit(module, data)
    assert torch.equal(drawn[0], drawn[2])


def test_a_model_made_in_configure_model_is_refused(tmp_path):
    class Late(CausalLM):
        def __init__(self):
            LightningModule.__init__(self)

    with pytest.raises(ValueError, match=r"Late has no parameters in setup.*build the model in __init__"):
        fit([OneShotPrune(Magnitude(NM(2, 4))), MaskEnforcer()], tmp_path, Late())


def test_a_dense_model_with_a_stray_zero_is_warned_of(tmp_path):
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
    with torch.no_grad():
        module.model.model.layers[0].mlp.up_proj.weight[0, 0] = 0
    with pytest.warns(UserWarning, match=r"holds the zeros of the model: 0.00% of 14 layers"):
        fit([MaskEnforcer()], tmp_path, module, max_steps=1)


def test_masks_and_reports_of_a_users_callback_are_not_taken(tmp_path):
    """What a callback of a user calls `masks` or `report` is its own."""
    theirs = prune_sequentially(
        tiny_llama(hidden_size=32, layers=2), None, Magnitude(Unstructured(0.25)), progress=False
    )

    class Other(Callback):
        masks, report = theirs.masks, theirs

    given = MaskSet({name: torch.rand(theirs.masks.shape(name)) < 0.5 for name in theirs.masks})
    enforcer = MaskEnforcer(given)
    fit([Other(), enforcer, Other()], tmp_path, max_steps=2)
    assert enforcer.masks == given != theirs.masks


def test_masks_of_a_subclass_of_iterative_prune_are_taken(tmp_path):
    class Mine(IterativePrune):
        pass

    prune, enforcer = Mine(ConstantSchedule(0.5, begin=1)), MaskEnforcer()
    fit([prune, enforcer], tmp_path, max_steps=2)
    assert enforcer.masks == prune.masks
    assert enforcer.masks.sparsity() == 0.5


def test_a_lightning_that_hides_the_checkpoint_is_not_taken_for_a_new_fit(tmp_path):
    trainer = trainer_of([], tmp_path)

    def renamed(self):
        return resumed_checkpoint(self)

    assert resumed_checkpoint(trainer) is None  # no fit
    trainer.state.status = TrainerStatus.RUNNING
    with pytest.raises(RuntimeError, match=r"does not say whether the fit resumes .* allows \(lightning>=2.6.6,<2.7\)"):
        renamed(trainer)

    def _run(self, ckpt_path):
        return resumed_checkpoint(self)

    assert _run(trainer, "last.ckpt") == "last.ckpt"
    assert _run(trainer, None) is None


class WithTeacher(CausalLM):
    """A frozen copy of the same architecture, registered first."""

    def __init__(self, frozen=True):
        super().__init__(tiny_llama(hidden_size=32, layers=2), optimizer)
        student = self._modules.pop("model")
        self.teacher = tiny_llama(seed=1, hidden_size=32, layers=2).requires_grad_(not frozen)
        self.model = student


@pytest.mark.parametrize("how", ["one_shot", "file", "zeros"])
def test_masks_go_to_the_student_and_not_to_its_teacher(tmp_path, how):
    module = WithTeacher()
    assert next(iter(dict(module.named_parameters()))).startswith("teacher.")
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    enforcer = MaskEnforcer()
    callbacks = [enforcer]
    if how == "one_shot":
        callbacks = [OneShotPrune(Wanda(Unstructured(0.5)), batches(2), progress=False), enforcer]
    else:
        masks = prune_sequentially(module.model, None, Magnitude(Unstructured(0.5)), progress=False).masks
        masks.save(tmp_path / "masks.safetensors")
        callbacks = [MaskEnforcer(tmp_path / "masks.safetensors") if how == "file" else enforcer]
    fit(callbacks, tmp_path, module, max_steps=6)
    student = {name: p for name, p in module.model.named_parameters() if "proj" in name}
    assert MaskSet.from_nonzero(student).sparsity() == pytest.approx(0.5, abs=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())


def test_masks_that_fit_two_trained_models_are_refused(tmp_path):
    masks = prune_sequentially(
        tiny_llama(hidden_size=32, layers=2), None, Magnitude(Unstructured(0.5)), progress=False
    ).masks
    with pytest.raises(ValueError, match=r"fit 2 models, \['teacher', 'model'\], of which 2 are trained; one must be"):
        fit([MaskEnforcer(masks)], tmp_path, WithTeacher(frozen=False))
    module = WithTeacher()
    module.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"of which 0 are trained; one must be: freeze the others"):
        masks.apply_(module.named_parameters())


def named_by_hand():
    """A model whose configuration does not say how many blocks it has: they need a name."""
    module = CausalLM(tiny_llama(hidden_size=32, layers=2), optimizer)
    module.model.config.num_hidden_layers = 7
    return module


def test_blocks_that_need_a_name_get_it(tmp_path):
    module = named_by_hand()
    prune = OneShotPrune(Magnitude(NM(2, 4)), blocks="model.layers", progress=False)
    fit([prune, MaskEnforcer()], tmp_path, module)
    with pytest.raises(ValueError, match=r'Name the list of blocks with blocks="..."'):
        fit([MaskEnforcer()], tmp_path, module)
    enforcer = MaskEnforcer(blocks="model.layers")
    fit([enforcer], tmp_path, module)
    assert enforcer.masks == prune.report.masks
    with pytest.raises(ValueError, match=r'Name the list of blocks with blocks="..."'):
        fit([LoRARecovery(), MaskEnforcer(blocks="model.layers")], tmp_path, module)
    fit([LoRARecovery(blocks="model.layers"), MaskEnforcer(blocks="model.layers")], tmp_path, module)
    assert prune.report.masks.violations(module.named_parameters()) == {}


def test_what_has_no_argument_blocks_does_not_recommend_it():
    module = named_by_hand()
    module._device_mesh = {"data_parallel": None}
    with pytest.raises(ValueError, match="CausalLM shards a model by its decoder blocks.*Shard it yourself") as caught:
        module.configure_model()
    assert "blocks=" not in str(caught.value)
