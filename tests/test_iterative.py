"""IterativePrune in real fits: what every hook does, exact counts, rewinding from a file, resuming."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from fits import optimizer, trainer_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR

from prune_callbacks import (
    NM,
    Block,
    CausalLM,
    ConstantSchedule,
    CubicSchedule,
    IMPSchedule,
    IterativePrune,
    LinearSchedule,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    Rewind,
    Rows,
    SparseGPT,
    TokenDataModule,
    Unstructured,
)
from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.targets import find_targets
from prune_callbacks.engine.iterative import shrink_masks
from prune_callbacks.parallel.plain import PlainAccess
from prune_callbacks.tasks import TextFile, tiny_llama


def warmup(optimizer, num_training_steps):
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def loader(count=80):
    generator = torch.Generator().manual_seed(5)
    return torch.utils.data.DataLoader(torch.randint(3, 200, (count, 16), generator=generator), batch_size=2)


def module_of(scheduler=None, seed=0):
    return CausalLM(tiny_llama(seed, hidden_size=32, layers=2), optimizer, scheduler)


def fit(callbacks, tmp_path, module=None, ckpt_path=None, **settings):
    module = module or module_of()
    trainer = trainer_of(callbacks, tmp_path, **settings)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer, module


class Spy(Callback):
    """
    After every optimizer step, before any callback, and after every batch, behind all callbacks: what is there.

    By finished steps: the sparsity of the masks, the weights that violate them, the largest moment at a pruned
    place, and a copy of weights, moments and learning rate.
    """

    def __init__(self):
        self.inside, self.after = {}, {}

    def on_train_start(self, trainer, pl_module):
        self.prune = next(c for c in trainer.callbacks if isinstance(c, IterativePrune))
        self.trainer, self.module = trainer, pl_module
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.look(self.inside, trainer.global_step + 1))
        self.look(self.after, trainer.global_step)

    def on_train_batch_end(self, trainer, *_):
        self.look(self.after, trainer.global_step)

    def look(self, into, step):
        masks, state = self.prune.masks, self.trainer.optimizers[0].state
        named = masks.matching(self.module.named_parameters())
        moments = {n: {k: v.clone() for k, v in state[p].items()} for n, p in named.items()}
        dead = [
            float(v[~masks[n]].abs().max())
            for n, s in moments.items()
            for v in s.values()
            if v.shape == named[n].shape and not masks[n].all()
        ]
        into[step] = {
            "masks": masks,
            "violations": sum(masks.violations(self.module.named_parameters()).values()),
            "moment": max(dead, default=0.0),
            "weights": {n: p.detach().clone() for n, p in self.module.named_parameters()},
            "moments": moments,
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
        }


def kept_after(spy, steps):
    return [sum(int(m.sum()) for m in spy.after[t]["masks"].values()) for t in steps]


def test_imp_keeps_its_share_to_one_weight_and_never_takes_one_back(tmp_path):
    schedule = IMPSchedule(0.9, rounds=4, every=3, begin=5)
    spy, prune = Spy(), IterativePrune(schedule, rewind=Rewind(2))
    fit([prune, MaskEnforcer(), spy], tmp_path)
    total = sum(m.numel() for m in prune.masks.values())
    for r, time in enumerate(schedule.changes, 1):
        (kept,) = kept_after(spy, [time])
        assert abs(kept - total * 0.1 ** (r / 4)) <= 1
        assert kept == total - round(schedule(time) * total)
    for step in range(1, 21):
        before, now = spy.after[step - 1]["masks"], spy.after[step]["masks"]
        assert (before == now) == (step not in schedule.changes)
        assert all(bool((now[n] <= before[n]).all()) for n in now)
        assert spy.inside[step]["violations"] == spy.after[step]["violations"] == 0
        assert spy.inside[step]["moment"] == spy.after[step]["moment"] == 0.0
    assert (prune.round, prune.target) == (4, 0.9)


def test_the_smallest_of_all_layers_go(tmp_path):
    """Against one flat sort of everything; layers end with different sparsities, which scope="layer" does not allow."""
    spy, prune = Spy(), IterativePrune(ConstantSchedule(0.6, begin=4))
    trainer, _ = fit([prune, MaskEnforcer(), spy], tmp_path, max_steps=6)
    before = prune.masks.matching(spy.inside[4]["weights"])
    flat = torch.cat([before[n].abs().flatten() for n in prune.masks])
    order = torch.sort(flat, descending=True, stable=True).indices[: len(flat) - round(0.6 * len(flat))]
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[order] = True
    assert torch.equal(torch.cat([prune.masks[n].flatten() for n in prune.masks]), expected)
    fractions = prune.masks.layer_sparsity().values()
    assert max(fractions) - min(fractions) > 0.01
    assert trainer.callback_metrics["sparsity"] == pytest.approx(0.6, abs=1e-4)
    layerwise = IterativePrune(ConstantSchedule(0.6, begin=4), scope="layer")
    fit([layerwise, MaskEnforcer()], tmp_path, max_steps=6)
    assert list(layerwise.masks.layer_sparsity().values()) == pytest.approx([0.6] * 14, abs=1e-3)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, per="row"), Block(8, 0.5), Unstructured(0.5)], ids=repr)
def test_patterns_grow_layer_by_layer(tmp_path, pattern):
    spy = Spy()
    prune = IterativePrune(LinearSchedule(0.5, 0, 8, every=2), scope="layer", pruner=Magnitude(pattern))
    fit([prune, MaskEnforcer(), spy], tmp_path, max_steps=10)
    prune.masks.check(pattern)
    for time in (2, 4, 6, 8):
        assert spy.after[time]["masks"].sparsity() == pytest.approx(0.5 * time / 8, abs=0.02)
    assert spy.after[9]["violations"] == 0


def test_rewinding_restores_weights_moments_and_learning_rate_from_the_file(tmp_path):
    spy, prune = Spy(), IterativePrune(IMPSchedule(0.5, rounds=2, every=4, begin=6), rewind=Rewind(3))
    fit([prune, MaskEnforcer(), spy], tmp_path, module_of(warmup), max_steps=14)
    early = spy.after[3]
    for time in (6, 10):
        now = spy.after[time]
        assert now["lr"] == early["lr"] != spy.inside[time]["lr"]
        for name, value in now["weights"].items():
            mask = now["masks"].get(name.removeprefix("model."))
            assert torch.equal(value, early["weights"][name] if mask is None else early["weights"][name] * mask), name
        for name, state in now["moments"].items():
            for key, value in state.items():
                dense = early["moments"][name][key]
                assert torch.equal(value, dense * now["masks"][name] if dense.ndim else dense)
    # The masks are those of the trained weights, not of the rewound ones.
    trained = prune.masks.matching(spy.inside[6]["weights"])
    smallest = {
        n: w.abs()[~spy.after[6]["masks"][n]].max() for n, w in trained.items() if (~spy.after[6]["masks"][n]).any()
    }
    assert max(smallest.values()) <= min(w.abs()[spy.after[6]["masks"][n]].min() for n, w in trained.items())
    assert spy.after[7]["lr"] == spy.after[4]["lr"]
    saved = torch.load(tmp_path / "rewind_step_3.pt", weights_only=True)
    assert torch.equal(saved["state_dict"]["model.lm_head.weight"], early["weights"]["model.model.embed_tokens.weight"])


def test_rewinding_to_the_ticket_and_weights_only(tmp_path):
    spy, module = Spy(), module_of(warmup)
    initial = {n: p.detach().clone() for n, p in module.named_parameters()}
    prune = IterativePrune(ConstantSchedule(0.5, begin=5), rewind=Rewind(0, optimizer=False))
    fit([prune, MaskEnforcer(), spy], tmp_path, module, max_steps=7)
    now = spy.after[5]
    assert torch.equal(now["weights"]["model.model.norm.weight"], initial["model.model.norm.weight"])
    assert now["lr"] == pytest.approx(1e-2 / 6)  # goes on
    step = now["moments"]["model.layers.0.mlp.up_proj.weight"]["step"]
    assert int(step) == 5
    assert now["moment"] == 0.0


def test_control_without_zeroed_moments_they_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(PlainAccess, "_moments", lambda *_: iter(()))
    spy = Spy()
    fit([IterativePrune(ConstantSchedule(0.5, begin=5)), MaskEnforcer(), spy], tmp_path, max_steps=9)
    assert spy.after[5]["moment"] > 1e-4
    assert spy.after[8]["moment"] > 1e-5


def test_control_a_weight_without_its_moments_zeroed_would_move(tmp_path, monkeypatch):
    """Neither moments zeroed nor weights projected: momentum brings pruned weights back although gradients are held."""
    monkeypatch.setattr(PlainAccess, "_moments", lambda *_: iter(()))
    enforcer, spy = MaskEnforcer(), Spy()
    monkeypatch.setattr(enforcer, "_after_step", lambda *_: None)
    with pytest.raises(ValueError, match="pruned weights are not zero in the module that the fit hands back"):
        fit([IterativePrune(ConstantSchedule(0.5, begin=5)), enforcer, spy], tmp_path, max_steps=7)
    assert spy.after[5]["violations"] == 0
    assert spy.after[6]["violations"] > 1000


def test_epochs_as_the_unit(tmp_path):
    sparsities = []

    class Epochs(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            sparsities.append(round(prune.masks.sparsity(), 3))

    prune = IterativePrune(CubicSchedule(0.8, 0, 2, initial=0.2, unit="epoch"))
    fit([prune, MaskEnforcer(), Epochs()], tmp_path, max_steps=-1, max_epochs=4)
    assert sparsities == [0.2, 0.725, 0.8, 0.8]


def test_it_goes_on_from_a_one_shot_pruned_model(tmp_path):
    one_shot = OneShotPrune(Magnitude(NM(2, 4)), targets="*.mlp.*", progress=False)
    prune = IterativePrune(LinearSchedule(0.8, 0, 6, every=3), targets="*.self_attn.*")
    enforcer = MaskEnforcer()
    _, module = fit([one_shot, prune, enforcer], tmp_path, max_steps=8)
    fractions = enforcer.masks.layer_sparsity()
    assert {f for n, f in fractions.items() if "mlp" in n} == {0.5}
    attention = MaskSet({n: m for n, m in enforcer.masks.items() if "self_attn" in n})
    assert attention.sparsity() == pytest.approx(0.8, abs=1e-4)
    assert enforcer.masks.violations(module.named_parameters()) == {}


def dropping():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=259, n_positions=16))


STEPS = IMPSchedule(0.9, 3, every=3, begin=5)
EPOCHS = IMPSchedule(0.9, 2, every=1, unit="epoch")
RESUMED = {
    "before the first round": (STEPS, 2, {"max_steps": 20}),
    "at the end of an epoch": (STEPS, 8, {"max_steps": 20}),
    "in a round": (STEPS, 9, {"max_steps": 20}),
    "right behind a change": (STEPS, 11, {"max_steps": 20}),
    "where the length must be estimated": (STEPS, 9, {"max_steps": -1, "max_epochs": 3}),
    "by epochs, in one": (EPOCHS, 11, {"max_steps": -1, "max_epochs": 3}),
    "by epochs, with an epoch's last step": (EPOCHS, 8, {"max_steps": -1, "max_epochs": 3}),
    "with short epochs": (STEPS, 6, {"max_steps": 20, "limit_train_batches": 12}),
}


QUICK = {  # the others in make test-all
    "in a round": (None, Rewind(2)),
    "right behind a change": (Rewind(2),),
    "before the first round": (Rewind(2),),
    "by epochs, with an epoch's last step": (None, Rewind(2)),
    "at the end of an epoch": (None,),
}


@pytest.mark.parametrize(
    ("case", "rewind"),
    [
        pytest.param(
            *(case, rewind),
            id=f"{case}{', rewinding' * bool(rewind)}",
            marks=() if rewind in QUICK.get(case, ()) else pytest.mark.slow,
        )
        for case in RESUMED
        for rewind in (None, Rewind(2))
    ],
)
def test_a_resumed_fit_ends_with_the_same_bits(tmp_path, tokenizer, case, rewind):
    """Epochs of 16 batches, two batches a step."""
    schedule, stop, settings = RESUMED[case]
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(40)))

    def run(model, folder, *more, ckpt_path=None):
        module = CausalLM(model, optimizer, warmup)
        text = [TextFile(str(tmp_path / "text.txt"))] * 3
        data = TokenDataModule(tokenizer, *text, seq_len=16, batch_size=2, train_windows=32, calibration_windows=1)
        callbacks = [IterativePrune(schedule, rewind=rewind), MaskEnforcer(), *more]
        trainer = trainer_of(callbacks, tmp_path / folder, enable_checkpointing=bool(more), **settings)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return callbacks

    whole, part, again = dropping(), dropping(), dropping()
    part.load_state_dict(whole.state_dict())
    torch.manual_seed(1)  # of the dropout
    first = run(whole, "whole")
    torch.manual_seed(1)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="at_{step}", every_n_train_steps=stop, save_top_k=-1)
    run(part, "part", checkpoint)
    torch.manual_seed(2)
    resumed = run(again, "part", ckpt_path=tmp_path / f"at_step={stop}.ckpt")
    assert resumed[0].masks == first[0].masks == resumed[1].masks
    assert resumed[0].round == len(schedule.changes)
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def checkpointed(tmp_path, prune, **settings):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="at", every_n_train_steps=8, save_top_k=-1)
    fit([prune, MaskEnforcer(), checkpoint], tmp_path, max_steps=8, enable_checkpointing=True, **settings)
    return tmp_path / "at.ckpt"


def imp(**settings):
    return IterativePrune(IMPSchedule(0.5, rounds=2, every=3), **settings)


def test_a_missing_or_foreign_rewind_file_is_refused_at_resume(tmp_path):
    path = checkpointed(tmp_path, imp(rewind=Rewind(1)))
    file = tmp_path / "rewind_step_1.pt"
    moved = tmp_path / "elsewhere" / file.name
    moved.parent.mkdir()
    os.replace(file, moved)
    with pytest.raises(ValueError, match=r"there is no rewind file at .*rewind_step_1.pt"):
        fit([imp(rewind=Rewind(1)), MaskEnforcer()], tmp_path, ckpt_path=path)
    fit([imp(rewind=Rewind(1, dirpath=moved.parent)), MaskEnforcer()], tmp_path, ckpt_path=path, max_steps=9)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="another run has written over it"):
        fit([imp(rewind=Rewind(1)), MaskEnforcer()], tmp_path, ckpt_path=path)


def test_a_checkpoint_without_its_state_and_another_schedule(tmp_path):
    path = checkpointed(tmp_path, imp())
    other = IterativePrune(IMPSchedule(0.6, rounds=2, every=5))
    with pytest.warns(UserWarning, match=r"trained by IMPSchedule\(target=0.5.*resumes with IMPSchedule\(target=0.6"):
        fit([other, MaskEnforcer()], tmp_path, ckpt_path=path)
    assert other.masks.sparsity() == pytest.approx(0.6, abs=1e-4)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="dense", every_n_train_steps=2, save_top_k=-1)
    fit([checkpoint], tmp_path, max_steps=2, enable_checkpointing=True)
    with pytest.raises(ValueError, match="holds no state of IterativePrune"):
        fit([imp(), MaskEnforcer()], tmp_path, ckpt_path=tmp_path / "dense.ckpt")
    with pytest.raises(
        ValueError,
        match=r"was written with rewind=None, and IterativePrune has rewind=Rewind\(1, True\); resume with the same",
    ):
        fit([imp(rewind=Rewind(1)), MaskEnforcer()], tmp_path, ckpt_path=path)


def test_bad_settings_are_refused_before_training(tmp_path, unchecked):
    class Falls:
        target, unit, changes = 0.5, "step", (1, 2)

        def __call__(self, time):
            return 0.5 - time / 10

    with pytest.raises(ValueError, match="the sparsity must rise at every change"):
        IterativePrune(Falls())
    with pytest.raises(ValueError, match="takes a schedule such as"):
        IterativePrune(0.5)
    with pytest.raises(ValueError, match=r"by Magnitude or another .*; got SparseGPT\(.*Use OneShotPrune"):
        imp(pruner=SparseGPT(Unstructured(0.5)))
    with pytest.raises(ValueError, match="has one sparsity and cannot follow a schedule"):
        imp(pruner=Magnitude(NM(2, 4)))
    with pytest.raises(ValueError, match=r"Block\(.* is a structure inside one layer.*use scope='layer'"):
        imp(pruner=Magnitude(Block(4, 0.5)))
    with pytest.raises(ValueError, match="the schedule ends at 0.5 and the pattern says 0.9"):
        imp(pruner=Magnitude(Unstructured(0.9)))
    with pytest.raises(ValueError, match='scope must be "global" or "layer", got \'model\''):
        imp(scope="model")
    with pytest.raises(ValueError, match=r"rewind is None or Rewind\(step=...\), got 3"):
        imp(rewind=3)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Rewind(-1)
    for callbacks in ([imp()], [MaskEnforcer(), imp()]):
        with pytest.raises(ValueError, match=r"needs MaskEnforcer\(\) after it among the callbacks"):
            fit(callbacks, tmp_path)
    with pytest.raises(
        ValueError, match=r"reaches 0.5 after 6 optimizer steps, and training ends after 6. Train for longer"
    ):
        fit([imp(), MaskEnforcer()], tmp_path, max_steps=6)
    with pytest.raises(ValueError, match=r"Rewind\(step=3\) lies beyond the first round, which ends after 3 of 20"):
        fit([imp(rewind=Rewind(3)), MaskEnforcer()], tmp_path)
    epochs = IterativePrune(IMPSchedule(0.5, 2, 1, unit="epoch"), rewind=Rewind(25))
    with pytest.raises(ValueError, match=r"Rewind\(step=25\) lies beyond the first round, which ends after 20 of 60"):
        fit([epochs, MaskEnforcer()], tmp_path, max_steps=-1, max_epochs=3)
    with pytest.raises(ValueError, match=r"layer model.layers.0.self_attn.q_proj: Block\(5, 0.5\) needs both"):
        fit([imp(scope="layer", pruner=Magnitude(Block(5, 0.5))), MaskEnforcer()], tmp_path)


def test_a_debug_run_checks_no_lengths(tmp_path):
    fit([imp(), MaskEnforcer()], tmp_path, fast_dev_run=2, max_steps=-1)


def test_shrinking_reads_conv1d_the_other_way_round():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    layers = find_targets(find_blocks(model))
    whole = MaskSet({f"{n}.weight": torch.ones(t.stored.shape) > 0 for n, t in layers.items()})
    own = {f"{name}.weight": [target] for name, target in layers.items()}
    masks = shrink_masks(PlainAccess(model, whole), own, 0.5, Magnitude(Unstructured(0.5, per="row")), "layer")
    assert {n: m.shape for n, m in masks.items()} == {f"{n}.weight": t.stored.shape for n, t in layers.items()}
    for name, target in layers.items():  # rows are outputs: columns of a Conv1D's weight
        assert bool((masks[f"{name}.weight"].sum(0) == target.stored.shape[0] // 2).all())


def test_the_rewind_file_lies_with_the_logs(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    fit([imp(rewind=Rewind(1)), MaskEnforcer()], tmp_path, max_steps=8, logger=CSVLogger(tmp_path / "logs"))
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("rewind*")] == [
        Path("logs/lightning_logs/version_0/rewind_step_1.pt")
    ]


def test_it_goes_on_from_masks_given_to_the_enforcer_and_from_a_sparse_model(tmp_path):
    module = module_of()
    weights = {n: p for n, p in module.model.named_parameters() if "proj" in n}
    masks = MaskSet({n: NM(2, 4).keep(p.detach().abs()) for n, p in weights.items()})
    for enforcer in (MaskEnforcer(masks), MaskEnforcer()):
        spy, prune = Spy(), IterativePrune(ConstantSchedule(0.7, begin=4))
        fit([prune, enforcer, spy], tmp_path, module, max_steps=6)  # the second fit: of the model that is sparse now
        assert spy.after[0]["masks"].sparsity() >= 0.5
        assert masks.violations(module.named_parameters()) == {}
        assert prune.masks.sparsity() == pytest.approx(0.7, abs=1e-4)
        assert all(bool((prune.masks[n] <= masks[n]).all()) for n in masks)


def test_a_change_that_was_interrupted_was_not_made(tmp_path, monkeypatch):
    """Ctrl-C while masks are put in force, a checkpoint written on the way out, and the fit resumed from it."""
    enforcer, prune = MaskEnforcer(), IterativePrune(LinearSchedule(0.8, 0, 8, every=4))
    hold, calls = enforcer.hold, []

    def interrupted(masks, trainer):
        calls.append(masks)
        if len(calls) == 2:  # the first is that of the start
            raise KeyboardInterrupt
        hold(masks, trainer)

    monkeypatch.setattr(enforcer, "hold", interrupted)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="out", every_n_train_steps=99, save_on_exception=True)
    with pytest.raises(SystemExit):
        fit([prune, enforcer, checkpoint], tmp_path, max_steps=10, enable_checkpointing=True)
    again, held = IterativePrune(LinearSchedule(0.8, 0, 8, every=4)), MaskEnforcer()
    _, module = fit([again, held], tmp_path, ckpt_path=tmp_path / "out.ckpt", max_steps=10)
    assert held.masks == again.masks
    assert again.masks.sparsity() == pytest.approx(0.8, abs=1e-4)
    assert again.masks.violations(module.named_parameters()) == {}


def test_a_rewind_file_that_another_run_wrote_over_is_noticed_when_it_is_read(tmp_path):
    class Overwrite(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                (tmp_path / "rewind_step_1.pt").write_bytes(b"something else")

    with pytest.raises(ValueError, match="is not the rewind file that this training wrote: another run has written"):
        fit([imp(rewind=Rewind(1)), MaskEnforcer(), Overwrite()], tmp_path)


def test_a_scheduler_that_cannot_be_read_back_is_refused_when_it_is_saved(tmp_path):
    class Odd(LambdaLR):
        def state_dict(self):
            return super().state_dict() | {"odd": Path("x")}

    module = module_of(lambda optimizer, num_training_steps: Odd(optimizer, lambda step: 1.0))
    with pytest.raises(ValueError, match="learning-rate scheduler holds objects that cannot be read back safely"):
        fit([imp(rewind=Rewind(1)), MaskEnforcer()], tmp_path, module)


def test_rows_after_an_unstructured_pruning_go_by_what_is_left_of_them(tmp_path):
    one_shot = OneShotPrune(Magnitude(NM(2, 4)), progress=False)
    prune = IterativePrune(ConstantSchedule(0.75), scope="layer", pruner=Magnitude(Rows(0.75)))
    module = module_of()
    dense = {n: p.detach().clone() for n, p in module.model.named_parameters() if "proj" in n}
    fit([one_shot, prune, MaskEnforcer()], tmp_path, module, max_steps=1)
    for name, weight in dense.items():
        left = (weight.abs() * one_shot.report.masks[name]).sum(1)
        kept = set(torch.sort(left, descending=True, stable=True).indices[: len(left) // 4].tolist())
        assert set(prune.masks[name].any(1).nonzero().flatten().tolist()) == kept


def test_a_checkpoint_that_lightning_cannot_resume_exactly_is_warned_of(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)  # at the end of every epoch
    settings = {"enable_checkpointing": True, "limit_train_batches": 8}
    fit([imp(), MaskEnforcer(), checkpoint], tmp_path, max_steps=10, **settings)
    with pytest.warns(UserWarning, match="where Lightning 2.6 repeats a batch"):
        fit([imp(), MaskEnforcer()], tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt", max_steps=10, limit_train_batches=8)
    fit([imp(), MaskEnforcer(), checkpoint], tmp_path / "b", max_steps=-1, max_epochs=3, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint .* was written at the end of an epoch")
        fit([imp(), MaskEnforcer()], tmp_path, ckpt_path=tmp_path / "epoch=1-v1.ckpt", max_steps=-1, max_epochs=3)


def test_resuming_with_other_targets_is_refused(tmp_path):
    path = checkpointed(tmp_path, imp())
    with pytest.raises(ValueError, match=r"was written with targets=None, and IterativePrune has targets=\*.mlp.\*"):
        fit([imp(targets="*.mlp.*"), MaskEnforcer()], tmp_path, ckpt_path=path)


def test_lengths_in_epochs_are_checked_in_steps(tmp_path):
    schedule = IMPSchedule(0.9, 2, every=1, unit="epoch")  # of 20 steps
    with pytest.raises(ValueError, match="reaches 0.9 after 40 optimizer steps, and training ends after 30"):
        fit([IterativePrune(schedule), MaskEnforcer()], tmp_path, max_steps=30)
    prune = IterativePrune(schedule, rewind=Rewind(4))
    fit([prune, MaskEnforcer()], tmp_path, max_steps=42, max_epochs=10)
    assert prune.masks.sparsity() == pytest.approx(0.9, abs=1e-4)


def test_training_that_ends_early_says_so(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 4

    with pytest.warns(UserWarning, match="training ended after 4 optimizer steps, at a sparsity of 0.29"):
        fit([imp(), MaskEnforcer(), Stop()], tmp_path)
