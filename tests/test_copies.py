"""Zeros wherever weights are copied: averages, checkpoints, the module that a fit hands back."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from fits import trainer_of
from fuzz import OPTIMIZERS, PrunedPlaces
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.optim.swa_utils import AveragedModel

from prune_callbacks import (
    NM,
    CubicSchedule,
    IterativePrune,
    LoRARecovery,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    RunReport,
)
from prune_callbacks.storage.consolidation import consolidate
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import CausalLM, tiny_llama


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def module_of():
    return CausalLM(tiny_llama(hidden_size=32, layers=2), adamw)


def batches(count=4):
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(torch.randint(3, 200, (count, 2, 16)), batch_size=None)


def cubic():
    return IterativePrune(CubicSchedule(0.6, 0, 8))


def run(callbacks, tmp_path, module=None, **settings):
    module = module_of() if module is None else module
    settings = {"max_steps": 12, "accumulate_grad_batches": 1, "enable_checkpointing": True} | settings
    if settings["enable_checkpointing"]:
        callbacks = [*callbacks, ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, every_n_train_steps=1)]
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = trainer_of(callbacks, tmp_path, **settings)
    trainer.fit(module, batches(), batches(1), ckpt_path=ckpt_path)
    return module, trainer, sorted((tmp_path / "ckpt").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)


def assert_zeros(masks, module, files):
    """Zeros in the module and, by the masks of their own, in every checkpoint."""
    assert masks.violations(module.named_parameters()) == {}
    assert masks.sparsity() > 0.5
    for file in files:
        state = torch.load(file, weights_only=False)
        own = type(masks).from_state_dict(state["callbacks"]["MaskEnforcer"]["masks"])
        for key in ("state_dict", "current_model_state"):
            if key in state:
                assert own.violations(state[key]) == {}, (file, key)


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=1),
    "average": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_have_the_zeros_too(kind, first, tmp_path):
    average, enforcer = AVERAGES[kind](), MaskEnforcer()
    ours = [cubic(), enforcer]
    settings = {"max_steps": -1, "max_epochs": 4} if kind == "swa" else {}
    module, trainer, files = run([average, *ours] if first else [*ours, average], tmp_path, **settings)
    assert_zeros(enforcer.masks, module, files)
    assert len(files) == 12 if kind != "swa" else files
    model = average._average_model
    assert enforcer.masks.violations(getattr(model, "module", model).named_parameters()) == {}
    averaged = dict(getattr(model, "module", model).named_parameters())
    assert all(torch.equal(value, averaged[name]) for name, value in module.named_parameters())  # it was handed over
    trainer.validate(module, batches(1), verbose=False)
    again = module_of()
    again.load_state_dict(torch.load(files[-1], weights_only=False)["state_dict"])
    assert enforcer.masks.violations(again.named_parameters()) == {}


def test_control_without_the_enforcer_the_average_is_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(MaskEnforcer, "_project_averages", lambda self, trainer: None)
    average, enforcer = AVERAGES["ema"](), MaskEnforcer()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"\d+ pruned weights are not zero in the module that .* hands back.*EMA"):
            run([cubic(), enforcer, average], tmp_path)
    assert any("a checkpoint had" in str(w.message) for w in heard)


def test_an_average_in_the_module_itself(tmp_path):
    class Averaging(CausalLM):
        def __init__(self):
            super().__init__(tiny_llama(hidden_size=32, layers=2), adamw)
            self.ema = AveragedModel(self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
            self.ema.requires_grad_(False)

        def on_train_batch_end(self, *args):
            self.ema.update_parameters(self.model)

    enforcer = MaskEnforcer()
    module, _, files = run([cubic(), enforcer], tmp_path, Averaging())
    assert_zeros(enforcer.masks, module.model, ())
    assert enforcer.masks.violations(module.ema.module.named_parameters()) == {}
    assert all(p.count_nonzero() for p in module.ema.parameters())


def test_a_frozen_copy_in_a_callback_is_no_average(tmp_path):
    class Teaching(Callback):
        def setup(self, trainer, pl_module, stage):
            self.teacher = copy.deepcopy(pl_module.model).requires_grad_(False)

    teaching, enforcer = Teaching(), MaskEnforcer()
    dense = {name: value.clone() for name, value in module_of().model.named_parameters()}
    run([teaching, cubic(), enforcer], tmp_path)
    assert all(torch.equal(value, dense[name]) for name, value in teaching.teacher.named_parameters())


class Writing(Callback):
    """Writes into pruned weights at one hook."""

    def __init__(self, hook):
        setattr(self, hook, self.write)
        self.stages = []

    def write(self, trainer, pl_module, *args, **kwargs):
        self.stages.append(trainer.state.fn)
        with torch.no_grad():
            pl_module.model.model.layers[1].mlp.up_proj.weight += 1


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
@pytest.mark.parametrize("first", [True, False])
def test_what_writes_after_the_last_step_is_named(hook, first, tmp_path):
    ours = [OneShotPrune(Magnitude(NM(1, 4)), progress=False), MaskEnforcer()]
    writing = Writing(hook)
    expected = r"2304 pruned weights are not zero in the module that the fit hands back, in 1 layers, first "
    expected += r"model.layers.1.mlp.up_proj.weight \(2304\).*one of the callbacks Writing, or a hook of the module"
    with pytest.raises(ValueError, match=expected):
        run([writing, *ours] if first else [*ours, writing], tmp_path, max_steps=2)


def test_what_writes_earlier_is_zeroed_by_the_next_step_and_in_checkpoints(tmp_path):
    enforcer = MaskEnforcer()
    ours = [OneShotPrune(Magnitude(NM(1, 4)), progress=False), enforcer]
    module, trainer, files = run([*ours, Writing("on_train_batch_start")], tmp_path, max_steps=3)
    assert_zeros(enforcer.masks, module, files)
    assert [type(callback).__name__ for callback in trainer.callbacks].count("AfterAll") == 0


def test_averages_stand_before_the_report_and_not_beside_adapters(tmp_path):
    average = AVERAGES["ema"]()
    with pytest.raises(ValueError, match=r"RunReport measures .* EMAWeightAveraging, after it .* before RunReport"):
        run([RunReport(tmp_path / "run"), cubic(), MaskEnforcer(), average], tmp_path)
    prune = OneShotPrune(Magnitude(NM(2, 4)), progress=False)
    with pytest.raises(ValueError, match=r"LoRARecovery changes the layers .* leave out EMAWeightAveraging"):
        run([prune, LoRARecovery(), MaskEnforcer(), average], tmp_path)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"LBFGS", "Muon"}))
def test_what_any_optimizer_keeps_of_a_pruned_weight_is_zero(name, tmp_path):
    enforcer = MaskEnforcer()
    steps = PrunedPlaces(lambda: enforcer.masks)
    module = CausalLM(tiny_llama(hidden_size=16, layers=1), lambda p: getattr(torch.optim, name)(p, **OPTIMIZERS[name]))
    callbacks = [IterativePrune(CubicSchedule(0.6, 1, 4)), enforcer, steps]
    run(callbacks, tmp_path, module, max_steps=6, enable_checkpointing=False)
    assert (steps.steps, steps.worst) == (6, 0.0)
    assert enforcer.masks.violations(module.named_parameters()) == {}


def test_a_checkpoint_of_weights_alone_is_consolidated_by_its_zeros(tmp_path):
    module, prune = module_of(), OneShotPrune(Magnitude(NM(1, 4)), progress=False)
    weights = ModelCheckpoint(tmp_path / "w", every_n_train_steps=2, save_weights_only=True)
    run([prune, MaskEnforcer(), weights], tmp_path, module, max_steps=2, enable_checkpointing=True)
    save_sparse_model(module.model, prune.report.masks, tmp_path / "template")
    (file,) = (tmp_path / "w").glob("*.ckpt")
    with pytest.warns(UserWarning, match=r"weights alone .* so the masks are the zeros of the model: 14 matrices"):
        report = consolidate(file, tmp_path / "template/model", tmp_path / "out", progress=False)
    assert MaskSet.load(tmp_path / "out/masks.safetensors") == prune.report.masks
    assert report["violations"] == {}
    assert any("masks are the zeros of the model" in text for text in report["warnings"])
    with pytest.raises((KeyError, ValueError), match=r"checkpoint|save_weights_only"):
        run([OneShotPrune(Magnitude(NM(1, 4)), progress=False), MaskEnforcer()], tmp_path, ckpt_path=file, max_steps=3)
    dense = tmp_path / "dense.ckpt"
    torch.save({"state_dict": module_of().state_dict(), "global_step": 0}, dense)
    with pytest.raises(ValueError, match=r"weights alone .*none of its matrices has 1% of zeros"):
        consolidate(dense, tmp_path / "template/model", tmp_path / "out2", progress=False)


@pytest.fixture
def template(tmp_path):
    """The folder of a sparse model, its masks and its weights as a module has them."""
    module, prune = module_of(), OneShotPrune(Magnitude(NM(1, 4)), progress=False)
    trainer_of([prune, MaskEnforcer()], tmp_path, max_steps=1).fit(module, batches())
    save_sparse_model(module.model, prune.report.masks, tmp_path / "template")
    return tmp_path / "template/model", prune.report.masks, module.state_dict()


def test_weights_without_a_trainings_state_are_no_checkpoint(template, tmp_path):
    folder, _, weights = template
    text = "so it is no checkpoint of Lightning. Give a file or folder that a Trainer wrote"
    files = {
        "plain.pt": (weights, r"has no 'global_step', its \d+ entries are 'model.model.embed_tokens.weight', .*"),
        "nested.ckpt": ({"state_dict": weights}, "has no 'global_step', its 1 entries are 'state_dict', .*"),
        "step.ckpt": ({"global_step": 3}, "has no 'state_dict', its 1 entries are 'global_step', .*"),
        "list.pt": ([1, 2], "holds a list, "),
    }
    for name, (state, found) in files.items():
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} {found}{text}"):
            consolidate(tmp_path / name, folder, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=rf"model.safetensors is no file of torch.save .*{text}"):
        consolidate(folder / "model.safetensors", folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_zero_rows_of_embeddings_are_no_pruned_weights(template, tmp_path):
    folder, masks, weights = template
    padded = {name: value.clone() for name, value in weights.items()}
    for name in ("model.model.embed_tokens.weight", "model.lm_head.weight"):
        padded[name][: len(padded[name]) // 8] = 0
    torch.save({"state_dict": padded, "global_step": 1}, tmp_path / "weights.ckpt")
    with pytest.warns(UserWarning, match="zeros of the model: 14 matrices with 75.00%"):
        consolidate(tmp_path / "weights.ckpt", folder, tmp_path / "out", progress=False)
    assert MaskSet.load(tmp_path / "out/masks.safetensors") == masks


def test_zeros_of_a_model_without_blocks_leave_embeddings_out(tmp_path):
    config = hf.BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1)
    config.update({"encoder_ffn_dim": 16, "decoder_ffn_dim": 16})
    config.update({"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16})
    model = hf.BartForConditionalGeneration(config)
    with torch.no_grad():
        model.model.shared.weight[:8] = 0
        model.model.decoder.layers[0].fc1.weight[:4] = 0
    model.save_pretrained(tmp_path / "template")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "weights.ckpt")
    with pytest.warns(UserWarning, match="zeros of the model: 1 matrices with 25.00%"):
        consolidate(tmp_path / "weights.ckpt", tmp_path / "template", tmp_path / "out", progress=False)
    assert list(MaskSet.load(tmp_path / "out/masks.safetensors")) == ["model.decoder.layers.0.fc1.weight"]


def test_a_fit_whose_callbacks_hold_no_masks_is_consolidated_by_its_zeros(template, tmp_path):
    folder, masks, weights = template
    module = module_of()
    module.load_state_dict(weights)
    _, _, files = run([LoRARecovery()], tmp_path, module, max_steps=1)
    with pytest.warns(
        UserWarning, match=r"no callback in it holds masks.* so the masks are the zeros of the model: 14"
    ):
        report = consolidate(files[-1], folder, tmp_path / "out", progress=False)
    assert MaskSet.load(tmp_path / "out/masks.safetensors") == masks
    assert any("no callback in it holds masks" in text for text in report["warnings"])
    _, _, files = run([], tmp_path, module_of(), max_steps=1)
    with pytest.raises(ValueError, match=r"holds no masks: .*without MaskEnforcer.*none of its matrices has 1%"):
        consolidate(files[-1], folder, tmp_path / "out2", progress=False)


def test_the_masks_of_a_subclass_are_found(tmp_path):
    class Mine(MaskEnforcer):
        pass

    enforcer = Mine()
    module, _, files = run([cubic(), enforcer], tmp_path, max_steps=9)
    save_sparse_model(module.model, enforcer.masks, tmp_path / "template")
    state = torch.load(files[-1], weights_only=False)
    del state["callbacks"]["IterativePrune"]
    torch.save(state, tmp_path / "without.ckpt")
    report = consolidate(tmp_path / "without.ckpt", tmp_path / "template/model", tmp_path / "out", progress=False)
    assert MaskSet.load(tmp_path / "out/masks.safetensors") == enforcer.masks
    assert report["violations"] == {}


def test_a_checkpoint_of_student_and_teacher_is_masked_too(tmp_path):
    class Pair(CausalLM):
        def __init__(self):
            super().__init__(tiny_llama(hidden_size=32, layers=2), adamw)
            self.teacher = tiny_llama(1, hidden_size=32, layers=2).requires_grad_(False)

    class Overwriting(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["state_dict"] = {name: torch.ones_like(v) for name, v in checkpoint["state_dict"].items()}

    enforcer = MaskEnforcer()
    ours = [OneShotPrune(Magnitude(NM(1, 4)), progress=False), enforcer]
    with pytest.warns(UserWarning, match=r"a checkpoint had \d+ pruned weights .* callbacks Overwriting, or a hook"):
        _, _, files = run([*ours, Overwriting()], tmp_path, Pair(), max_steps=1)
    state = torch.load(files[0], weights_only=False)["state_dict"]
    parts = {
        part: {n.removeprefix(part): v for n, v in state.items() if n.startswith(part)}
        for part in ("model.", "teacher.")
    }
    assert enforcer.masks.violations(parts["model."]) == {}
    assert all(value.all() for value in parts["teacher."].values())
