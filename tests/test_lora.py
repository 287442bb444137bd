"""LoRA on sparse models: masked updates merge exactly and keep every zero; plain ones are not merged in silence."""

import shutil

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prune_callbacks import (
    NM,
    CausalLM,
    ConstantSchedule,
    IterativePrune,
    LoRARecovery,
    Magnitude,
    MaskEnforcer,
    MaskSet,
    OneShotPrune,
    Unstructured,
    Wanda,
    prune_sequentially,
)
from prune_callbacks.adapters import MaskedLoraLinear, add_lora, merge_lora
from prune_callbacks.adapters.plain_state import PlainState
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.storage.consolidation import consolidate
from prune_callbacks.storage.model_folder import save_sparse_model
from prune_callbacks.tasks import tiny_llama

IDS = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(1))


def sparse_llama(pattern=None):
    model = tiny_llama(hidden_size=32, layers=2)
    pruner = Magnitude(pattern or NM(2, 4))
    return model, prune_sequentially(model, None, pruner, progress=False).masks


def gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=259, n_positions=32)).eval()
    return model, prune_sequentially(model, None, Magnitude(NM(2, 4)), progress=False).masks


def names(masks):
    return [name.removesuffix(".weight") for name in masks]


def adapted(model, masks, masked, **settings):
    """With an update that is not zero, as after training."""
    wrapper = add_lora(model, names(masks), LoraConfig(r=4, lora_alpha=8, **settings), masked=masked)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return wrapper


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("make", [sparse_llama, gpt2])
def test_a_masked_lora_merges_exactly_and_keeps_every_zero(make):
    model, masks = make()
    dense_names = set(model.state_dict())
    unadapted = logits(model)
    wrapper = adapted(model, masks, masked=True)
    before = logits(model)
    assert float((before - unadapted).abs().max()) > 1e-2
    assert merge_lora(wrapper, masks) is None
    assert torch.allclose(logits(model), before, atol=1e-5, rtol=1e-5)
    assert masks.violations(model.named_parameters()) == {}
    assert set(model.state_dict()) == dense_names
    assert not hasattr(model, "peft_config")
    nonzero = MaskSet.from_nonzero(masks.matching(model.named_parameters()))
    assert nonzero.sparsity() == 0.5


def test_control_a_plain_lora_loses_the_zeros_when_it_is_merged():
    """40 % sparse before; dense after: what other tools do in silence."""
    model, masks = sparse_llama(Unstructured(0.4))
    wrapper = adapted(model, masks, masked=False)
    with pytest.raises(ValueError, match=r"fill the 9834 zeros of 14 layers \(40.0%\). Keep it as an adapter, train"):
        merge_lora(wrapper, masks)
    with pytest.raises(ValueError, match=r"reports what the merge costs; give windows="):
        merge_lora(wrapper, masks, lossy="zeros")
    before, measured = logits(model), perplexity(model, IDS, progress=False)
    cost = merge_lora(wrapper, masks, lossy="zeros", windows=IDS)
    assert torch.allclose(logits(model), before, atol=1e-5, rtol=1e-5)
    assert cost.sparsity[0] == pytest.approx(0.4, abs=1e-3)
    assert cost.sparsity[1] < 0.01
    assert cost.perplexity == pytest.approx((measured, measured), rel=1e-4)


def test_a_plain_lora_merged_without_the_part_on_the_zeros_costs_quality():
    model, masks = sparse_llama()
    wrapper = adapted(model, masks, masked=False)
    cost = merge_lora(wrapper, masks, lossy="update", windows=IDS)
    assert masks.violations(model.named_parameters()) == {}
    assert cost.sparsity == (0.5, 0.5)
    assert cost.perplexity[1] == pytest.approx(perplexity(model, IDS, progress=False))
    assert abs(cost.perplexity[1] / cost.perplexity[0] - 1) > 1e-4


def test_a_masked_layer_is_the_linear_layer_that_merging_makes_of_it():
    """Output and all gradients, against autograd through the written-out formula in float64."""
    base = nn.Linear(8, 6).double()
    base.weight.data *= NM(2, 4).keep(base.weight.abs())
    holder = nn.ModuleDict({"layer": base})
    layer = MaskedLoraLinear(base, "default", LoraConfig(r=2, lora_alpha=6), r=2, lora_alpha=6).double()
    assert holder["layer"] is layer.get_base_layer()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, 3, 6, dtype=torch.float64)
    (layer(x) * target).sum().backward()
    got = [x.grad.clone(), a.grad.clone(), b.grad.clone()]
    x.grad = a.grad = b.grad = None
    weight = base.weight.detach() + (base.weight.detach() != 0) * (b @ a) * 3.0
    expected = x @ weight.T + base.bias.detach()
    assert torch.allclose(layer(x), expected, atol=1e-12)
    (expected * target).sum().backward()
    for mine, theirs in zip(got, [x.grad, a.grad, b.grad], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def fit(callbacks, tmp_path, model, ckpt_path=None, steps=6, **settings):
    module = CausalLM(model, lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=0.1))
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **{"enable_checkpointing": False, **settings},
    )
    trainer.fit(module, torch.utils.data.DataLoader(IDS.repeat(8, 1), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def test_masked_recovery_in_a_fit_ends_with_a_plain_sparse_model(tmp_path):
    model = tiny_llama(hidden_size=32, layers=2)
    keys, trained = set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    one_shot, enforcer = OneShotPrune(Magnitude(NM(2, 4)), progress=False), MaskEnforcer()
    begin = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = fit([one_shot, LoRARecovery(LoraConfig(r=4)), enforcer], tmp_path, model, log_every_n_steps=1)
    masks = one_shot.report.masks
    assert enforcer.masks == masks
    assert trainer.callback_metrics["violations"] == 0
    assert set(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == trained
    assert masks.violations(model.named_parameters()) == {}
    after = dict(model.named_parameters())
    assert MaskSet.from_nonzero(masks.matching(after)) == masks
    changed = {n for n in begin if not torch.equal(after[n], begin[n])}
    assert changed == {n for n in begin if "proj" in n}  # embeddings and norms are frozen
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((after[name] - begin[name] * masks[name]).abs().max()) > 1e-3


def test_plain_recovery_keeps_base_and_adapter_apart(tmp_path):
    model, masks = sparse_llama()
    save_sparse_model(model, masks, tmp_path)
    recovery = LoRARecovery(LoraConfig(r=4), masked=False, dirpath=tmp_path)
    fit([recovery, MaskEnforcer(masks)], tmp_path, model)
    expected = logits(model)
    save_sparse_model(model, masks, tmp_path / "again")
    first, second = (load_file(folder / "model/model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert masks.violations(base.named_parameters()) == {}
    assert not torch.allclose(logits(base), expected, atol=1e-3)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    with pytest.raises(ValueError, match="fill the 12288 zeros of 14 layers"):
        merge_lora(loaded, masks)


@pytest.mark.parametrize("masked", [True, False])
def test_a_killed_recovery_goes_on_to_the_same_bits(tmp_path, masked):
    def run(folder, model, ckpt_path=None, **settings):
        lora = LoRARecovery(LoraConfig(r=4), masked=masked)
        callbacks = [OneShotPrune(Magnitude(NM(2, 4)), progress=False), lora, MaskEnforcer()]
        if settings:
            callbacks.append(ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=12))
        fit(callbacks, tmp_path / folder, model, ckpt_path, steps=16, **settings)

    whole, part = (tiny_llama(hidden_size=32, layers=2) for _ in range(2))
    torch.manual_seed(3)
    run("a", whole)
    torch.manual_seed(3)
    run("b", part, enable_checkpointing=True)
    resumed = tiny_llama(5, hidden_size=32, layers=2)
    run("c", resumed, tmp_path / "step=12.ckpt")  # 12 steps are an epoch
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


def test_a_resumed_recovery_adapts_what_the_checkpoint_has(tmp_path):
    """A layer that calibration never reached was skipped; without OneShotPrune the resumed model may be dense yet."""

    def model():
        llama = tiny_llama(hidden_size=32, layers=2)
        llama.model.layers[0].unused = nn.Linear(8, 8)
        return llama

    def run(callbacks, made, **settings):
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=12)
        callbacks = [*callbacks, LoRARecovery(LoraConfig(r=4)), MaskEnforcer(), checkpoint]
        fit(callbacks, tmp_path, made, steps=14, enable_checkpointing=True, **settings)
        return made

    one_shot = OneShotPrune(Wanda(NM(2, 4)), [IDS], progress=False)
    with pytest.warns(UserWarning, match="unused stays dense"):
        whole = run([one_shot], model())
    resumed = run([one_shot], model(), ckpt_path=tmp_path / "step=12.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    sparse, _ = sparse_llama()
    run([], sparse)
    run([], tiny_llama(hidden_size=32, layers=2), ckpt_path=tmp_path / "step=12-v1.ckpt")


def test_a_fit_that_failed_leaves_no_adapters_for_the_next(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("on purpose")

    model, masks = sparse_llama()
    recovery = LoRARecovery(LoraConfig(r=4))
    with pytest.raises(RuntimeError, match="on purpose"):
        fit([recovery, MaskEnforcer(), Fails()], tmp_path, model)
    fit([recovery, MaskEnforcer()], tmp_path, model)
    assert masks.violations(model.named_parameters()) == {}


@pytest.mark.parametrize("masked", [True, False])
def test_a_fit_resumed_at_its_last_step_merges_and_saves_too(tmp_path, masked):
    def run(model, **settings):
        lora = LoRARecovery(LoraConfig(r=4), masked=masked, dirpath=None if masked else tmp_path)
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=6)
        fit([lora, MaskEnforcer(), checkpoint], tmp_path, model, enable_checkpointing=True, **settings)

    whole, masks = sparse_llama()
    run(whole)
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    again, _ = sparse_llama()
    run(again, ckpt_path=tmp_path / "step=6.ckpt")  # 6 steps are all there are
    assert torch.equal(logits(again), logits(whole))
    assert masks.violations(again.named_parameters()) == {}
    assert (tmp_path / "adapter/adapter_config.json").exists() != masked
    other = LoRARecovery(LoraConfig(r=4), masked=not masked)
    with pytest.raises(ValueError, match=rf"was trained by LoRARecovery\(masked={masked}\); resume with the same"):
        fit([other, MaskEnforcer()], tmp_path, sparse_llama()[0], ckpt_path=tmp_path / "step=6.ckpt")


def test_lists_of_a_configuration_library_are_written_too(tmp_path):
    config = instantiate({"_target_": "peft.LoraConfig", "r": 4, "target_modules": ["q_proj", "v_proj"]})
    model, _ = sparse_llama()
    fit([LoRARecovery(config, masked=False, dirpath=tmp_path), MaskEnforcer()], tmp_path, model)
    assert sorted(LoraConfig.from_pretrained(tmp_path / "adapter").target_modules) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_masked_recovery_in_half_precision(tmp_path, precision):
    model, masks = sparse_llama()
    fit([LoRARecovery(LoraConfig(r=4)), MaskEnforcer()], tmp_path, model, precision=precision)
    assert masks.violations(model.named_parameters()) == {}
    assert MaskSet.from_nonzero(masks.matching(model.named_parameters())).sparsity() == pytest.approx(0.5, abs=1e-3)


def test_bad_settings_are_refused_before_training(tmp_path, unchecked):
    model, masks = sparse_llama()
    with pytest.raises(
        ValueError, match=r"LoRA on 1 layers that are not pruned, first lm_head; of 5 targeted layers 4"
    ):
        add_lora(model, names(masks), LoraConfig(target_modules=["lm_head", "q_proj", "v_proj"]), masked=True)
    with pytest.raises(ValueError, match=r"LoRA on 1 layers that are not pruned, first model.embed_tokens"):
        add_lora(model, names(masks), LoraConfig(target_modules=["embed_tokens", "q_proj"]), masked=False)
    for masked in (True, False):
        for option in (
            {"use_dora": True},
            {"modules_to_save": ["lm_head"]},
            {"init_lora_weights": "pissa"},
            {"bias": "all"},
        ):
            with pytest.raises(ValueError, match=f"and nothing else: leave out {next(iter(option))}"):
                add_lora(model, names(masks), LoraConfig(**option), masked=masked)
    with pytest.raises(ValueError, match="a low-rank update under its mask and nothing else: leave out lora_dropout"):
        add_lora(model, names(masks), LoraConfig(lora_dropout=0.1), masked=True)
    dense = tiny_llama(hidden_size=32, layers=2)
    with pytest.raises(ValueError, match=r"LoRARecovery found no pruned layer: there is no OneShotPrune before it"):
        fit([LoRARecovery()], tmp_path, dense)
    one_shot = OneShotPrune(Magnitude(NM(2, 4)), targets="*.mlp.*", progress=False)
    with pytest.raises(ValueError, match="LoRARecovery must stand after OneShotPrune"):
        fit([LoRARecovery(), one_shot, MaskEnforcer()], tmp_path, dense)
    with pytest.raises(ValueError, match="LoRARecovery freezes the weights that IterativePrune chooses from"):
        fit([IterativePrune(ConstantSchedule(0.5)), LoRARecovery(), MaskEnforcer()], tmp_path, dense)
    attention = LoRARecovery(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"LoRA on 2 layers that are not pruned, first model.layers.0.self_attn.q_proj"
    ):
        fit([one_shot, attention, MaskEnforcer()], tmp_path, dense)
    with pytest.raises(ValueError, match="LoRARecovery: config is a peft.LoraConfig, got {'r': 4}"):
        LoRARecovery({"r": 4})
    with pytest.raises(ValueError, match="dirpath is for the adapter of masked=False"):
        LoRARecovery(dirpath=tmp_path)
    with pytest.raises(ValueError, match="nothing else: leave out modules_to_save"):
        LoRARecovery(LoraConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="takes peft's wrapper around the model, got LlamaForCausalLM"):
        merge_lora(model, masks)
    wrapper = add_lora(model, names(masks), LoraConfig(), masked=True)
    with pytest.raises(ValueError, match="lossy must be None"):
        merge_lora(wrapper, masks, lossy="foo")
    with pytest.raises(ValueError, match="the model has adapters already"):
        add_lora(model, names(masks), LoraConfig(), masked=True)


class Small(CausalLM):
    """A module that is made without arguments, so that `load_from_checkpoint` makes it again."""

    def __init__(self):
        super().__init__(tiny_llama(hidden_size=32, layers=2), lambda p: torch.optim.Adam(p, 1e-2))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.model(batch, labels=batch).loss)


def recovered(tmp_path, **settings):
    """A fit of masked LoRA with the best of its checkpoints, whose model is not the last one."""
    module, masks = Small(), []
    best = ModelCheckpoint(tmp_path, filename="{step}", monitor="val_loss", save_last=True)
    callbacks = [OneShotPrune(Wanda(NM(2, 4)), [IDS], progress=False), LoRARecovery(LoraConfig(r=2)), MaskEnforcer()]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        callbacks=[*callbacks, best],
        val_check_interval=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **settings,
    )
    data = torch.utils.data.DataLoader(IDS.repeat(8, 1), batch_size=2)
    trainer.fit(module, data, torch.utils.data.DataLoader(IDS, batch_size=3))
    masks = callbacks[0].report.masks
    return module, trainer, best, masks, data


def test_the_best_checkpoint_is_tested_loaded_and_consolidated(tmp_path):
    module, trainer, best, masks, data = recovered(tmp_path)
    state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert state.keys() == Small().state_dict().keys()
    loader = torch.utils.data.DataLoader(IDS, batch_size=3)
    (found,) = trainer.test(module, loader, ckpt_path="best", verbose=False)
    again = Small.load_from_checkpoint(best.best_model_path)
    with torch.no_grad():
        loss = again.eval().model(IDS, labels=IDS).loss
    assert found["test_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert float(loss) == pytest.approx(float(best.best_model_score), rel=1e-3)  # the update is in it
    for model in (module, again):
        assert masks.violations(model.named_parameters()) == {}
    save_sparse_model(module.model, masks, tmp_path / "template")
    report = consolidate(best.best_model_path, tmp_path / "template/model", tmp_path / "out", progress=False)
    assert report["violations"] == {}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert torch.equal(logits(plain), logits(again.model))


def test_weights_alone_are_plain_too(tmp_path):
    module, trainer, best, masks, data = recovered(tmp_path)
    weights = ModelCheckpoint(tmp_path / "w", filename="{step}", every_n_train_steps=2, save_weights_only=True)
    fit(
        [LoRARecovery(LoraConfig(r=2)), MaskEnforcer(masks), weights], tmp_path, module.model, enable_checkpointing=True
    )
    (file,) = (tmp_path / "w").glob("*.ckpt")
    assert masks.violations(Small.load_from_checkpoint(file).named_parameters()) == {}
    with pytest.raises(ValueError, match=r"holds weights alone \(save_weights_only=True\): no fit can resume from it"):
        fit([LoRARecovery(), MaskEnforcer(masks)], tmp_path, sparse_llama()[0], ckpt_path=file)


def test_a_state_loaded_into_a_model_with_lora_layers_becomes_its_base():
    model, masks = sparse_llama()
    wrapper = adapted(model, masks, masked=True)
    plain = PlainState(model)
    expected, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    assert list(state) == list(sparse_llama()[0].state_dict())
    other = sparse_llama()[0]
    other.load_state_dict(state)
    assert torch.allclose(logits(other), expected, atol=1e-5)
    layers = plain.layers()
    model.load_state_dict(state)
    assert torch.allclose(logits(model), expected, atol=1e-5)  # merged into the base, with an update of zero
    assert all(not p.count_nonzero() for n, p in model.named_parameters() if "lora_B" in n)
    plain.restore(layers)
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)  # to the bit what it was
    plain.remove()
    assert any("lora_A" in key for key in model.state_dict())
    assert merge_lora(wrapper, masks) is None


def test_a_checkpoint_without_lora_layers_is_refused(tmp_path):
    _, _, best, masks, _ = recovered(tmp_path)
    model, _ = sparse_llama()
    plain = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    plain.fit(Small(), torch.utils.data.DataLoader(IDS, batch_size=3))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"plain.ckpt holds no LoRA layers: it was written after their update was mer"):
        fit([LoRARecovery(), MaskEnforcer(masks)], tmp_path, model, ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.parametrize("make", [LoHaConfig, LoKrConfig, IA3Config])
def test_other_adapters_are_refused_before_a_weight_changes(make):
    model, masks = sparse_llama()
    settings = {"target_modules": ["up_proj", "down_proj"]}
    if make is IA3Config:
        settings["feedforward_modules"] = ["down_proj"]
    wrapper = get_peft_model(model, make(**settings))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = make().peft_type.value
    for lossy in (None, "update"):
        with pytest.raises(ValueError, match=rf"the model has other adapters \(.*{kind}.*\), whose update would fill"):
            merge_lora(wrapper, masks, lossy=lossy, windows=IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("change", "text"), [({"r": 4}, "r=2, and this is 4"), ({"lora_alpha": 64}, "lora_alpha=8")])
def test_a_resumed_recovery_has_the_same_configuration(change, text, tmp_path):
    module, trainer, best, masks, _ = recovered(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    first = LoRARecovery(LoraConfig(r=2, lora_alpha=8))
    fit([first, MaskEnforcer(masks), checkpoint], tmp_path, sparse_llama()[0], enable_checkpointing=True)
    again = LoRARecovery(LoraConfig(**({"r": 2, "lora_alpha": 8} | change)))
    path = checkpoint.best_model_path
    with pytest.raises(ValueError, match=f"was trained by LoraConfig with {text}.*; resume with the same"):
        fit([again, MaskEnforcer(masks)], tmp_path, sparse_llama()[0], ckpt_path=path)
