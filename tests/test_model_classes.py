"""Models that are no causal language models keep their class and all of their weights, in every folder written."""

import json
import warnings

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from prune_callbacks import (
    Columns,
    Magnitude,
    SparseGPT,
    Structured,
    Unstructured,
    consolidate,
    load_compressed,
    prune_checkpoint,
    prune_sequentially,
    save_compressed,
    shrink,
)
from prune_callbacks.storage.model_folder import model_class, save_sparse_model

IDS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = IDS | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = IDS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
OPT = IDS | {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}

HALF = Magnitude(Unstructured(0.5))
BATCHES = torch.randint(3, 60, (3, 2, 24), generator=torch.Generator().manual_seed(1)).unbind()

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens for the")


def llava(**changes):
    vision = hf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    return hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**LLAMA), image_token_index=60, **changes)


MODELS = {
    "LlamaForCausalLM": lambda: hf.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "LlamaForSequenceClassification": lambda: hf.LlamaConfig(**LLAMA, tie_word_embeddings=True, num_labels=3),
    "LlamaForTokenClassification": lambda: hf.LlamaConfig(**LLAMA, num_labels=3),
    "LlamaForQuestionAnswering": lambda: hf.LlamaConfig(**LLAMA),
    "LlamaModel": lambda: hf.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "GPT2Model": lambda: hf.GPT2Config(**GPT2),
    "GPT2ForSequenceClassification": lambda: hf.GPT2Config(**GPT2, num_labels=3),
    "OPTForSequenceClassification": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=16, num_labels=3),
    "BertForMaskedLM": lambda: hf.BertConfig(**BERT),
    "BertForSequenceClassification": lambda: hf.BertConfig(**BERT, num_labels=3),
    "LlavaForConditionalGeneration": llava,
}


def made(name):
    torch.manual_seed(3)
    return getattr(hf, name)(MODELS[name]()).eval()


def files(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def named(folder):
    return json.loads((folder / "config.json").read_text())["architectures"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def inner(names):
    """The names inside of the list of blocks; Llava's files have other names outside of it than the model."""
    return {".".join(name.split(".")[-4:]) for name in names}


def loaded(folder, name):
    """The model, of which `from_pretrained` must make no weight up and leave none out."""
    model, info = getattr(hf, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model


@pytest.mark.parametrize("pruner", [HALF, SparseGPT(Unstructured(0.5))], ids=["magnitude", "sparsegpt"])
@pytest.mark.parametrize("name", MODELS)
def test_streaming_keeps_the_class_and_every_weight(tmp_path, name, pruner):
    source, target = tmp_path / "source", tmp_path / "target"
    model = made(name)
    model.save_pretrained(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*left out")
        report = prune_checkpoint(source, target, pruner, BATCHES, progress=False)
    assert named(target / "model") == [name]
    pruned, dense = files(target / "model"), files(source)
    assert pruned.keys() == dense.keys()
    changed = {key for key in dense if not torch.equal(pruned[key], dense[key])}
    assert inner(changed) == inner(report["sparsity"]["layers"])
    assert not any("vision" in key for key in changed)
    assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)
    in_memory = prune_sequentially(model, BATCHES, pruner, progress=False)
    assert set(in_memory.masks) == set(report["sparsity"]["layers"])
    assert same(loaded(target / "model", name).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_a_compressed_model_is_loaded_as_it_was(tmp_path, name):
    model = made(name)
    masks = prune_sequentially(model, None, HALF, progress=False).masks
    save_compressed(model, masks, tmp_path)
    again = load_compressed(tmp_path)
    assert type(again) is type(model)
    assert same(again.state_dict(), model.state_dict())
    assert named(tmp_path) == [name]


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_becomes_a_model_of_the_templates_class(tmp_path, name):
    """As Lightning writes it of a module with `self.model`."""
    model = made(name)
    template = tmp_path / "template"
    model.save_pretrained(template)
    masks = prune_sequentially(model, None, HALF, progress=False).masks
    weights = {f"model.{key}": value for key, value in model.state_dict().items()} | {"other.bias": torch.ones(2)}
    callbacks = {"MaskEnforcer": {"masks": masks.state_dict()}}
    torch.save({"state_dict": weights, "callbacks": callbacks, "global_step": 3}, tmp_path / "a.ckpt")
    report = consolidate(tmp_path / "a.ckpt", template, tmp_path / "out", progress=False)
    assert report["violations"] == {}
    assert named(tmp_path / "out/model") == [name]
    assert same(loaded(tmp_path / "out/model", name).state_dict(), model.state_dict())


def test_a_template_of_another_class_is_refused(tmp_path):
    """Llama's causal language model is all there but for the head, which would be left out."""
    model = made("LlamaForSequenceClassification")
    hf.LlamaConfig(**LLAMA, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]).save_pretrained(
        tmp_path / "t"
    )
    masks = prune_sequentially(model, None, HALF, progress=False).masks
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    callbacks = {"MaskEnforcer": {"masks": masks.state_dict()}}
    torch.save({"state_dict": weights, "callbacks": callbacks, "global_step": 3}, tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"1 of its weights under 'model.', first score.weight, are no weights of Llama"
    ):
        consolidate(tmp_path / "a.ckpt", tmp_path / "t", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def rewritten(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


WRONG = {
    "unknown": (
        {"architectures": ["FooForCausalLM"]},
        r"the class FooForCausalLM in `architectures`, which transformers",
    ),
    "no model": (
        {"architectures": ["AutoTokenizer"]},
        r"the class AutoTokenizer in `architectures`, which transformers",
    ),
    "remote": (
        {"architectures": ["FooForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_foo.FooForCausalLM"}},
        r"does not have, and the code that comes with the model \(auto_map\) is not run; install a version",
    ),
    "another": (
        {"architectures": ["MistralForCausalLM"]},
        "class MistralForCausalLM in `architectures`, which takes MistralConfig, and its model_type is 'llama'",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_class_that_is_not_there_is_named(tmp_path, kind):
    changes, text = WRONG[kind]
    source = tmp_path / "source"
    model = made("LlamaForCausalLM")
    model.save_pretrained(source)
    save_compressed(model, prune_sequentially(model, None, HALF, progress=False).masks, tmp_path / "compressed")
    torch.save({"state_dict": model.state_dict(), "callbacks": {}, "global_step": 3}, tmp_path / "a.ckpt")
    for folder in (source, tmp_path / "compressed"):
        rewritten(folder, **changes)
    with pytest.raises(ValueError, match=text):
        prune_checkpoint(source, tmp_path / "target", HALF, progress=False)
    with pytest.raises(ValueError, match=text):
        load_compressed(tmp_path / "compressed")
    with pytest.raises(ValueError, match=text):
        consolidate(tmp_path / "a.ckpt", source, tmp_path / "out", progress=False)
    assert not (tmp_path / "target").exists()


def test_without_a_class_it_is_a_causal_language_model(tmp_path):
    source = tmp_path / "source"
    made("LlamaForCausalLM").save_pretrained(source)
    rewritten(source, architectures=None)
    prune_checkpoint(source, tmp_path / "target", HALF, progress=False)
    assert named(tmp_path / "target/model") == ["LlamaForCausalLM"]
    made("LlamaForSequenceClassification").save_pretrained(source)
    rewritten(source, architectures=None)
    with pytest.raises(
        ValueError, match=r"1 tensors of .* first score.weight: config.json does not say of which class"
    ):
        prune_checkpoint(source, tmp_path / "other", HALF, progress=False)
    made("LlavaForConditionalGeneration").save_pretrained(source)
    rewritten(source, architectures=None)
    with pytest.raises(
        ValueError, match="names no class in `architectures`, and .* causal language model for LlavaConf"
    ):
        prune_checkpoint(source, tmp_path / "third", HALF, progress=False)


def test_what_the_class_does_not_have_is_left_out_with_a_warning(tmp_path):
    source = tmp_path / "source"
    made("LlamaForCausalLM").save_pretrained(source)
    save_file(files(source) | {"v_head.weight": torch.ones(3)}, source / "model.safetensors", {"format": "pt"})
    with pytest.warns(
        UserWarning, match="1 tensors of .* are no weights of LlamaForCausalLM and are left out, first v_h"
    ):
        prune_checkpoint(source, tmp_path / "target", HALF, progress=False)


def test_the_text_part_of_a_configuration_is_enough_for_a_text_model():
    text = hf.Gemma3TextConfig(**LLAMA, head_dim=8, num_key_value_heads=2)
    whole = hf.Gemma3Config(text_config=text, architectures=["Gemma3ForCausalLM"])
    assert model_class(whole) is hf.Gemma3ForCausalLM
    whole.architectures = None
    assert model_class(whole) is hf.Gemma3ForConditionalGeneration


class Mine(hf.LlamaForCausalLM):
    """A class that no folder can name."""


class Registered(hf.LlamaConfig):
    model_type = "registered-in-a-test"


class RegisteredForCausalLM(hf.LlamaForCausalLM):
    config_class = Registered


def test_a_class_of_ones_own_is_known_once_it_is_registered(tmp_path):
    model = Mine(hf.LlamaConfig(**LLAMA))
    masks = prune_sequentially(model, None, HALF, progress=False).masks
    with pytest.raises(ValueError, match="names the class Mine .* does not have; .* a class of transformers"):
        save_compressed(model, masks, tmp_path)
    Mine.__name__ = "LlamaForCausalLM"
    with pytest.raises(ValueError, match="test_model_classes.LlamaForCausalLM is none of them; save a model of one"):
        save_compressed(model, masks, tmp_path)
    hf.AutoConfig.register(Registered.model_type, Registered, exist_ok=True)
    hf.AutoModelForCausalLM.register(Registered, RegisteredForCausalLM, exist_ok=True)
    torch.manual_seed(0)
    model = RegisteredForCausalLM(Registered(**LLAMA))
    save_compressed(model, prune_sequentially(model, None, HALF, progress=False).masks, tmp_path)
    assert type(load_compressed(tmp_path)) is RegisteredForCausalLM
    model.save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "target", HALF, progress=False)
    assert named(tmp_path / "target/model") == ["RegisteredForCausalLM"]


def test_the_card_and_the_shrunk_model_keep_the_class(tmp_path):
    model = made("LlamaForSequenceClassification")
    masks = prune_sequentially(model, BATCHES, Structured(Columns(0.5)), progress=False).masks
    save_sparse_model(model, masks, tmp_path)
    assert "`LlamaForSequenceClassification.from_pretrained` loads" in (tmp_path / "model/README.md").read_text()
    smaller = shrink(model, masks)
    assert type(smaller) is type(model)
    torch.testing.assert_close(smaller(BATCHES[0]).logits, model(BATCHES[0]).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(smaller.score.weight, model.score.weight)
