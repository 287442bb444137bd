"""IterativePrune where the number of optimizer steps is the module's own business, or nobody's."""

import warnings

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from prune_callbacks import ConstantSchedule, IMPSchedule, IterativePrune, LinearSchedule, MaskEnforcer, Rewind
from prune_callbacks.tasks import CausalLM, tiny_llama

BATCH = torch.randint(3, 200, (2, 8), generator=torch.Generator().manual_seed(5))


class Manual(LightningModule):
    """Trains matrices by Muon and all other parameters by AdamW, each `times` a batch, or once in `every` batches."""

    def __init__(self, optimizers=2, times=1, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.model = tiny_llama(hidden_size=16, layers=1)
        self.count, self.times, self.every = optimizers, times, every

    def configure_optimizers(self):
        inner = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "layers" in n]
        others = [p for p in self.model.parameters() if not any(p is q for q in inner)]
        if self.count == 1:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [torch.optim.Muon(inner, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for _ in range(self.times):
            self.manual_backward(self.model(input_ids=batch, labels=batch).loss)
            if (batch_idx + 1) % self.every == 0:
                for optimizer in optimizers if self.count > 1 else [optimizers]:
                    optimizer.step()
                    optimizer.zero_grad()


class Endless(torch.utils.data.IterableDataset):
    def __init__(self, batches=None):
        self.batches = batches

    def __iter__(self):
        yield from (BATCH for _ in range(self.batches or 10**9))


def fit(prune, tmp_path, module, batches=6, callbacks=(), **settings):
    data = Endless() if batches is None else [BATCH] * batches if isinstance(batches, int) else batches
    given = {"max_steps": -1, "max_epochs": 1, "accumulate_grad_batches": 1, "gradient_clip_val": None} | settings
    trainer = trainer_of([prune, MaskEnforcer(), *callbacks], tmp_path, **given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to infer the `batch_size`|.*does not have many workers")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return trainer, prune


def holds(prune, module, sparsity):
    """Whether the schedule has ended and the weights are zero where its masks say so."""
    weights = dict(module.model.named_parameters())
    zeros = sum(int((weights[name] == 0).sum()) for name in prune.masks)
    total = sum(weights[name].numel() for name in prune.masks)
    return prune.target == sparsity and zeros == round(sparsity * total) and not prune.masks.violations(weights)


@pytest.mark.parametrize(
    ("given", "batches"),
    [({}, 6), ({"optimizers": 1, "times": 3}, 4), ({"every": 2}, 12), ({"times": 2}, 3)],
    ids=["two", "three-a-batch", "accumulating", "two-twice"],
)
def test_steps_are_those_of_all_optimizers(tmp_path, given, batches):
    module = Manual(**given)
    prune = IterativePrune(LinearSchedule(0.5, begin=0, end=10, every=2))  # more steps than batches
    trainer, _ = fit(prune, tmp_path, module, batches)
    assert trainer.global_step == 12
    assert holds(prune, module, 0.5)


def test_manual_training_that_ends_before_its_schedule_says_so(tmp_path):
    prune = IterativePrune(LinearSchedule(0.5, begin=0, end=20, every=2))
    with pytest.warns(
        UserWarning, match=r"ended after 12 optimizer steps, at a sparsity of 0.3, .* ends at 0.5, after 20"
    ):
        fit(prune, tmp_path, Manual())


def test_what_is_known_of_manual_training_is_checked(tmp_path):
    late = "reaches 0.5 after 20 optimizer steps, and training ends after 12. .* adds up the steps of all optimizers"
    with pytest.raises(ValueError, match=late):
        fit(IterativePrune(ConstantSchedule(0.5, 20)), tmp_path, Manual(), batches=60, max_steps=12)
    epochs = IterativePrune(ConstantSchedule(0.5, 2, unit="epoch"))
    with pytest.raises(ValueError, match="reaches 0.5 after 2 epochs, and training ends after 2"):
        fit(epochs, tmp_path, Manual(), max_epochs=2)
    with pytest.raises(ValueError, match=r"Rewind\(step=4\) lies beyond the first round, which ends after 4 of inf"):
        fit(IterativePrune(ConstantSchedule(0.5, 4), rewind=Rewind(4)), tmp_path, Manual())


@pytest.mark.parametrize("batches", [2, Endless(2)], ids=["known", "unknown"])
@pytest.mark.parametrize("manual", [True, False])
def test_epochs_need_no_count_of_steps(tmp_path, manual, batches):
    module = (
        Manual() if manual else CausalLM(tiny_llama(hidden_size=16, layers=1), lambda p: torch.optim.AdamW(p, 1e-2))
    )
    prune = IterativePrune(IMPSchedule(0.75, rounds=2, every=1, unit="epoch"), rewind=Rewind(0))
    fit(prune, tmp_path, module, batches, max_epochs=3)
    assert holds(prune, module, 0.75)


def test_a_rewind_that_was_not_reached_is_named(tmp_path):
    prune = IterativePrune(IMPSchedule(0.75, rounds=1, every=1, unit="epoch"), rewind=Rewind(5))
    with pytest.raises(
        ValueError, match=r"first round ends after 4 optimizer steps, and Rewind\(step=5\) is not reached"
    ):
        fit(prune, tmp_path, Manual(), batches=2, max_epochs=2)


@pytest.mark.parametrize(
    "settings",
    [{"max_epochs": -1, "max_time": {"seconds": 60}}, {"max_epochs": 1}, {"max_epochs": -1}],
    ids=["max_time", "no-length", "endless"],
)
@pytest.mark.parametrize("manual", [True, False])
def test_a_training_of_unknown_length_is_accepted(tmp_path, manual, settings):
    """An IterableDataset without a length made -1 steps of it."""

    class Stop(IterativePrune):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            trainer.should_stop = self.target == 0.5

    module = (
        Manual() if manual else CausalLM(tiny_llama(hidden_size=16, layers=1), lambda p: torch.optim.AdamW(p, 1e-2))
    )
    prune = Stop(ConstantSchedule(0.5, 4))
    trainer, _ = fit(prune, tmp_path, module, None, **settings)
    assert trainer.global_step == 4
    assert holds(prune, module, 0.5)


def test_accumulation_that_changes_is_counted(tmp_path):
    """4 batches an epoch: 2 steps in the first, 1 in the second."""

    def run(steps):
        module = CausalLM(tiny_llama(hidden_size=16, layers=1), lambda p: torch.optim.AdamW(p, 1e-2))
        changing = GradientAccumulationScheduler({0: 2, 1: 4})
        return fit(IterativePrune(ConstantSchedule(0.5, steps)), tmp_path, module, 4, [changing], max_epochs=2)

    with pytest.raises(ValueError, match="reaches 0.5 after 3 optimizer steps, and training ends after 3"):
        run(3)
    trainer, prune = run(2)
    assert (trainer.global_step, prune.target) == (3, 0.5)
