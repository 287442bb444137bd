"""What reaches the model of a calibration batch: all that its forward accepts, and never padding by mistake."""

import copy
import warnings
from collections import namedtuple

import pytest
import torch
import transformers as hf
import zoo
from fits import optimizer, trainer_of
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from prune_callbacks import (
    CubicSchedule,
    IterativePrune,
    MaskEnforcer,
    OneShotPrune,
    RunReport,
    Unstructured,
    Wanda,
    prune_checkpoint,
    prune_sequentially,
)
from prune_callbacks.measure.perplexity import perplexity
from prune_callbacks.studies.sensitivity import sensitivity

PRUNER = Wanda(Unstructured(0.5))
TEXT = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()


def padded():
    """Ids, their mask, and windows in which a third is padding."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 99, (6, 12)), torch.ones(6, 12, dtype=torch.long)
    mask[::2, 4:] = 0
    ids[mask == 0] = 50  # padding that is no rare word
    return ids, mask


def masks_of(model, batches, **settings):
    return prune_sequentially(model, batches, PRUNER, progress=False, **settings).masks


class Boring(LightningModule):
    """A user's own module around a model; `data` makes its loader, where it makes one."""

    def __init__(self, model=None, data=None):
        super().__init__()
        self.model = llama() if model is None else model
        self.data = data

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"] if isinstance(batch, dict) else batch[0]
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return optimizer(self.parameters())


def fit(module, tmp_path, data=None, *, callbacks=None, **settings):
    prune = OneShotPrune(PRUNER, progress=False, **settings)
    trainer = trainer_of([prune, MaskEnforcer()] if callbacks is None else callbacks, tmp_path, max_steps=1)
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data)
    return prune.report


class Rows(torch.utils.data.Dataset):
    """Rows of several fields, each a mapping."""

    def __init__(self, **fields):
        self.fields = fields

    def __len__(self):
        return len(self.fields["input_ids"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.fields.items()}


def test_padding_of_a_mapping_does_not_count_and_a_tuple_without_names_is_refused(tmp_path):
    ids, mask = padded()
    named = fit(Boring(), tmp_path, DataLoader(Rows(input_ids=ids, attention_mask=mask), 2)).masks
    expected = masks_of(
        llama(), [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2), strict=True)]
    )
    assert named == expected
    assert masks_of(llama(), list(ids.split(2))) != expected  # the control: padding would be seen
    message = r"a calibration batch is a \w+ of 2 values \(Tensor, Tensor\), which have no names: one may be the att"
    with pytest.raises(ValueError, match=message):
        fit(Boring(), tmp_path, DataLoader(TensorDataset(ids, mask), 2))
    for batches in ([(ids, mask)], [[ids, mask]], [(ids, mask, ids)], [({"input_ids": ids}, mask)]):
        with pytest.raises(ValueError, match="which have no names"):
            masks_of(llama(), batches)


def test_names_of_any_kind_count(tmp_path):
    ids, mask = padded()
    expected = masks_of(llama(), [{"input_ids": ids, "attention_mask": mask}])
    Batch = namedtuple("Batch", ["input_ids", "attention_mask"])
    encoding = hf.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    for batch in (Batch(ids, mask), encoding, [encoding], ({"input_ids": ids, "attention_mask": mask.bool()},)):
        assert masks_of(llama(), [batch]) == expected
    assert masks_of(llama(), [(ids,)]) == masks_of(llama(), [ids])


def test_keys_that_the_forward_does_not_take_are_named_once(tmp_path):
    ids, mask = padded()
    batches = [
        {"input_ids": i, "attention_mask": m, "idx": i[:, 0], "text": ["a"] * 2, "labels": i}
        for i, m in zip(ids.split(2), mask.split(2), strict=True)
    ]
    expected = masks_of(llama(), [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches])
    for run in (
        masks_of,
        lambda _, given: fit(Boring(), tmp_path, DataLoader(TensorDataset(padded()[0])), batches=given).masks,
    ):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            assert run(llama(), batches) == expected
        (told,) = [str(w.message) for w in heard if "calibration batches hold" in str(w.message)]
        assert told.endswith("hold 'idx', 'text', which the forward of LlamaForCausalLM does not accept: left out")


def test_positions_and_packed_lengths_are_passed_on():
    ids, _ = padded()
    positions = torch.arange(12).repeat(6, 1) % 4
    with_positions = masks_of(llama(), [{"input_ids": ids, "position_ids": positions}])
    assert with_positions != masks_of(llama(), [ids])
    from prune_callbacks.calibration.batches import accepted_inputs

    packed = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 12]), "whatever": 1}
    assert accepted_inputs(llama(), packed).keys() == {"input_ids", "cu_seq_lens_q"}


def test_embeddings_in_place_of_ids(tmp_path):
    ids, mask = padded()
    model = llama()
    vectors = model.get_input_embeddings()(ids).detach()
    expected = masks_of(llama(), [{"input_ids": ids, "attention_mask": mask}])
    assert masks_of(llama(), [{"inputs_embeds": vectors, "attention_mask": mask}]) == expected
    module = Boring()
    module.training_step = lambda batch, batch_idx: module.model(**batch).loss
    data = DataLoader(Rows(inputs_embeds=vectors, attention_mask=mask, labels=ids, input_ids=ids), 6)
    data.collate_fn = lambda rows: {
        k: torch.stack([row[k] for row in rows]) for k in ("inputs_embeds", "attention_mask", "labels")
    }
    assert fit(module, tmp_path, data).masks == expected
    with pytest.raises(ValueError, match=r"must hold input_ids.*or inputs_embeds.*; got \['attention_mask'\]"):
        masks_of(llama(), [{"attention_mask": mask}])


def llava():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**TEXT), image_token_index=98
    )
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration(config).eval()


def test_pictures_reach_the_language_model(tmp_path):
    torch.manual_seed(2)
    ids = torch.randint(3, 90, (4, 12))
    ids[:, 1:5] = 98  # four patches
    batches = [{"input_ids": i, "pixel_values": 3 * torch.randn(2, 3, 8, 8)} for i in ids.split(2)]
    model, seen = llava(), []
    layer = model.model.language_model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 16)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    scores = layer.weight.abs() * torch.cat(seen).double().norm(dim=0)
    keep = torch.zeros(16, 16, dtype=torch.bool).scatter_(1, scores.sort(1, descending=True).indices[:, :8], True)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    direct = masks_of(llava(), batches)
    assert torch.equal(direct[name], keep)
    by_callback = fit(Boring(llava()), tmp_path, DataLoader(TensorDataset(padded()[0])), batches=batches).masks
    assert by_callback == direct
    assert masks_of(llava(), [{"input_ids": b["input_ids"]} for b in batches]) != direct  # the control


@pytest.mark.parametrize("kind", ["dict", "list", "combined"])
def test_several_loaders_have_no_one_kind_of_batch(kind, tmp_path):
    ids, _ = padded()
    loader = DataLoader(TensorDataset(ids), 2)
    loaders = {"dict": {"text": loader, "code": loader}, "list": [loader, loader]}
    loaders["combined"] = CombinedLoader(loaders["dict"])
    with pytest.raises(
        ValueError, match=r"comes from several loaders \(.*name those that give the calibration batches with batches="
    ):
        fit(Boring(), tmp_path, loaders[kind])


def test_data_that_the_module_makes_in_its_own_setup(tmp_path):
    class Late(Boring):
        def setup(self, stage):
            self.rows = TensorDataset(padded()[0])

        def train_dataloader(self):
            return DataLoader(self.rows, 2)

    with pytest.raises(ValueError, match=r"train_dataloader of Late failed .*rows.* Its own setup\(\) has not run yet"):
        fit(Late(), tmp_path)
    ids, _ = padded()
    assert fit(Late(), tmp_path, batches=[ids]).masks == masks_of(llama(), [ids])

    class Early(LightningDataModule):
        setup, train_dataloader = Late.setup, Late.train_dataloader

    assert fit(Boring(), tmp_path, Early()).masks == masks_of(llama(), list(ids.split(2)))

    class Wrong(Boring):
        def train_dataloader(self):
            return DataLoader(self.rows, 2)

    class WithoutSetup(Wrong):
        def configure_model(self):
            pass

    for wrong in (Wrong, WithoutSetup):  # the user's own error, where setup is not the reason
        with pytest.raises(AttributeError, match="rows"):
            fit(wrong(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "data", "reason"),
    [
        ({}, None, "TypeError: .*NoneType.*"),
        ({"shuffle": True}, [], "ValueError: num_samples .*=0"),
        ({}, [], "ValueError: there is no calibration batch in the training data"),
    ],
)
def test_data_that_is_empty_until_the_modules_own_setup(settings, data, reason, tmp_path):
    class Late(Boring):
        def setup(self, stage):
            self.data = TensorDataset(padded()[0])

        def train_dataloader(self):
            return DataLoader(self.data, 2, **settings)

    text = rf"train_dataloader of Late failed \({reason}\). Its own setup\(\) has not run yet"
    with pytest.raises(ValueError, match=text):
        fit(Late(data=data), tmp_path)
    filled = TensorDataset(padded()[0])
    assert fit(Late(data=filled), tmp_path).masks.sparsity() == 0.5  # the control


def test_one_loader_in_a_list_and_batches_that_are_no_list_of_tensors(tmp_path):
    ids, mask = padded()
    loader = DataLoader(TensorDataset(ids), 2)
    expected = masks_of(llama(), list(ids.split(2)))

    class Unpacking(Boring):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)

    for given in ([loader], CombinedLoader([loader]), CombinedLoader(loader)):
        assert fit(Unpacking(), tmp_path, given).masks == expected
        assert fit(Boring(), tmp_path, loader, batches=given).masks == expected

    def pruned(given):
        return fit(Boring(), tmp_path, loader, batches=given)

    numbers = r"is a \w+ of numbers: numbers must be a tensor of shape \(batch, tokens\)"
    for given in (ids.tolist(), [ids.tolist()], [ids[:1].tolist()], [5], [ids.numpy()]):
        for run in (pruned, lambda batches: masks_of(llama(), batches)):
            with pytest.raises(ValueError, match=numbers):
                run(given)
    for one in ({"input_ids": ids, "attention_mask": mask}, hf.BatchEncoding({"input_ids": ids.tolist()})):
        with pytest.raises(ValueError, match=r"must be several batches, got one mapping of 'input_ids'.*into a list"):
            pruned(one)
        with pytest.raises(ValueError, match=r"got the text 'input_ids'.*put that batch into a list"):
            masks_of(llama(), one)
    with pytest.raises(ValueError, match=r"must be several batches, got one tensor of shape \(6, 12\)"):
        pruned(ids)


class Seen(Callback):
    """The ids of every training batch."""

    def __init__(self):
        self.ids = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids.append(batch[0].clone())


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler", "given"])
def test_training_draws_the_same_after_calibration_by_samplers_with_generators(kind, tmp_path):
    data = TensorDataset(padded()[0])
    drawn = []
    for pruned in (False, True):
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
        inner = {"batch_sampler": BatchSampler(sampler, 2, drop_last=False)}
        loader = DataLoader(data, **(inner if kind == "batch_sampler" else {"sampler": sampler, "batch_size": 2}))
        prune = OneShotPrune(PRUNER, loader if kind == "given" else None, progress=False)
        seen = Seen()
        fit(Boring(), tmp_path, loader, callbacks=[*([prune, MaskEnforcer()] if pruned else []), seen])
        drawn.append(torch.cat(seen.ids))
    assert torch.equal(*drawn)


def test_training_data_that_can_be_read_once_is_refused(tmp_path):
    ids, _ = padded()
    text = r"is a generator, which gives every batch once.*batches="
    with pytest.raises(ValueError, match=text):
        fit(Boring(), tmp_path, ((part,) for part in ids.split(2)))

    class Stored(Boring):
        def train_dataloader(self):
            return self.data

    with pytest.raises(ValueError, match=text):
        fit(Stored(data=((part,) for part in ids.split(2))), tmp_path)
    once = ((part,) for part in ids.split(2))
    assert fit(Boring(), tmp_path, once, batches=[ids]).masks == masks_of(llama(), [ids])

    class Anew(Boring):
        def train_dataloader(self):
            return ((part,) for part in ids.split(2))

    assert fit(Anew(), tmp_path).masks == masks_of(llama(), list(ids.split(2)))


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_model_that_the_module_makes_later(hook, tmp_path):
    class Late(Boring):
        def __init__(self):
            super().__init__(torch.nn.Linear(2, 2))

    setattr(Late, hook, lambda self, *args: setattr(self, "model", llama()))
    ids, _ = padded()
    text = "needs the model when the fit begins: build the model in __init__. Lightning calls the setup of callbacks"
    with pytest.raises(ValueError, match=f"no layer of Late is a target.*OneShotPrune {text} before that of Late"):
        fit(Late(), tmp_path, batches=[ids])
    with pytest.raises(ValueError, match=f"OneShotPrune {text}"):
        fit(Late(), tmp_path, batches=[ids], blocks="model.layers")
    rounds = IterativePrune(CubicSchedule(0.5, 0, 2))
    with pytest.raises(ValueError, match=f"IterativePrune {text}"):
        fit(Late(), tmp_path, DataLoader(TensorDataset(ids)), callbacks=[rounds, MaskEnforcer()])

    class Empty(Late):
        def __init__(self):
            LightningModule.__init__(self)

    class Data(LightningDataModule):
        evaluation_windows = ids

        def train_dataloader(self):
            return DataLoader(TensorDataset(ids), 2)

    for late, found in ((Late, "no layer of Late is a target"), (Empty, "Empty has no parameters in setup")):
        prune = OneShotPrune(PRUNER, progress=False)
        callbacks = [RunReport(tmp_path / "run", progress=False), prune, MaskEnforcer()]
        with pytest.raises(ValueError, match=rf"{found}.* OneShotPrune {text}"):
            fit(late(), tmp_path, Data(), callbacks=callbacks)
    assert not (tmp_path / "run").exists()


def test_a_wrong_name_of_blocks_is_no_model_that_is_made_later(tmp_path):
    class Own(Boring):
        def setup(self, stage):
            pass

    ids, _ = padded()
    with pytest.raises(ValueError, match=r"^blocks='model.h' is no nn.ModuleList of Ll.*it has \['model.layers'\]$"):
        fit(Own(), tmp_path, batches=[ids], blocks="model.h")
    given = DataLoader(TensorDataset(ids), 6)
    assert fit(Own(), tmp_path, given, blocks="model.layers").masks == masks_of(llama(), [ids])  # the control


def gpt2():
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return hf.GPT2LMHeadModel(config).eval()


def opt():
    config = hf.OPTConfig(vocab_size=99, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2)
    config.max_position_embeddings = 16
    return hf.OPTForCausalLM(config).eval()


def gptj():
    config = hf.GPTJConfig(vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=16, rotary_dim=4)
    return hf.GPTJForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gpt2, opt, gptj])
def test_windows_longer_than_the_table_of_positions(make, tmp_path):
    model, name = make(), type(make()).__name__
    ids = torch.randint(3, 99, (2, 32))
    text = rf"have 32 tokens, and {name} has a table of 16 positions .*at most 16 tokens"
    with pytest.raises(ValueError, match=f"calibration windows {text}"):
        masks_of(model, [ids[:, :16], ids])
    with pytest.raises(ValueError, match=f"calibration windows {text}"):
        masks_of(model, [{"inputs_embeds": torch.randn(2, 32, 16)}])
    with pytest.raises(ValueError, match=f"evaluation windows {text}"):
        perplexity(model, ids, progress=False)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=f"calibration windows {text}"):
        prune_checkpoint(tmp_path / "source", tmp_path / "target", PRUNER, [ids], progress=False)
    assert not (tmp_path / "target").exists()
    assert masks_of(model, [ids[:, :16]]).sparsity() == 0.5  # the longest that fits


def test_rotary_positions_have_no_table():
    config = hf.LlamaConfig(**TEXT, max_position_embeddings=16)
    torch.manual_seed(0)
    ids = torch.randint(3, 99, (2, 32))
    assert masks_of(hf.LlamaForCausalLM(config), [ids]).sparsity() == 0.5


def seq2seq():
    config = hf.BartConfig(
        vocab_size=99, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.BartForConditionalGeneration(config).eval()


def test_one_stack_of_a_sequence_to_sequence_model_can_be_named():
    ids, mask = padded()
    batches = [{"input_ids": ids, "labels": ids[:, :7].contiguous()}]
    for stack in ("encoder", "decoder"):
        masks = masks_of(seq2seq(), batches, blocks=f"model.{stack}.layers")
        assert all(name.startswith(f"model.{stack}.layers.") for name in masks)
        assert masks.sparsity() == 0.5


def test_padding_of_two_sequences_is_refused_where_one_list_of_blocks_is_measured():
    ids, mask = padded()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :7].contiguous()}
    with pytest.raises(ValueError, match=r"has padding, and of a sequence-to-sequence model it cannot be told here"):
        sensitivity(seq2seq(), [batch], ids, PRUNER, blocks="model.decoder.layers", progress=False)


@pytest.mark.parametrize("lengths", [(9, 6), (9, 9), (6, 9)], ids=["longer", "equal", "shorter"])
@pytest.mark.parametrize("kind", ["BART", "T5"])
def test_padding_of_two_sequences_counts_for_neither(kind, lengths):
    """The same masks as from every pair of sequences by itself, cut to its real tokens."""
    step, _, _, _ = zoo.made(kind)
    model = step.model.eval()
    torch.manual_seed(1)
    ids, labels = (torch.randint(3, 23, (4, length)) for length in lengths)
    reals = [torch.randint(3, length, (4,)).clamp(max=length - 1) for length in lengths]
    real, said = (torch.arange(n)[None] < some[:, None] for n, some in zip(lengths, reals, strict=True))
    whole = {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long()}
    whole["labels"] = labels.masked_fill(~said, -100)
    apart = [{"input_ids": ids[i : i + 1, : reals[0][i]], "labels": labels[i : i + 1, : reals[1][i]]} for i in range(4)]
    expected = masks_of(copy.deepcopy(model), apart)
    assert masks_of(copy.deepcopy(model), [whole]) == expected
    assert masks_of(copy.deepcopy(model), [{**whole, "decoder_input_ids": shifted(whole["labels"], model)}]) == expected
    counted = {"input_ids": whole["input_ids"], "labels": whole["labels"].masked_fill(~said, 0)}
    assert masks_of(copy.deepcopy(model), [counted]) != expected  # the control


def shifted(labels, model):
    """The inputs of the decoder that a model of transformers makes of labels."""
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, model.config.pad_token_id)], 1)


def test_padding_of_labels_beside_features():
    step, batches, _, _ = zoo.made("Whisper")
    labels = torch.randint(3, 23, (5, 4))
    labels[2:, 3:] = -100
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        masks_of(step.model, [batches[0] | {"labels": labels}])
    assert not any("padding" in str(warning.message) for warning in heard)
    with pytest.raises(ValueError, match=r"its decoder's 5 tokens may be as many as the places of its encoder"):
        masks_of(step.model, [batches[0] | {"labels": functional.pad(labels, (0, 1), value=-100)}])


def test_a_forward_that_hands_its_keywords_on_takes_what_its_bases_take():
    class Passing(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    ids, mask = padded()
    torch.manual_seed(0)
    passing = Passing(llama().config).eval()
    batch = {"input_ids": ids, "attention_mask": mask}
    passing.load_state_dict(llama().state_dict())
    assert masks_of(passing, [batch]) == masks_of(llama(), [batch])


def test_masks_that_do_not_tell_padding_and_windows_without_tokens_are_refused():
    ids, mask = padded()
    wide = torch.ones(6, 1, 12, 12, dtype=torch.bool)
    for wrong, got in ((wide, r"\(6, 1, 12, 12\)"), (mask[:, :7], r"\(6, 7\)"), (mask.tolist(), "list")):
        with pytest.raises(ValueError, match=rf"attention_mask must say .* a tensor of shape \(6, 12\); got {got}"):
            masks_of(llama(), [{"input_ids": ids, "attention_mask": wrong}])
    with pytest.raises(ValueError, match=r"of shape \(2, 0\) holds no token"):
        masks_of(llama(), [ids[:2, :0]])
    assert masks_of(llama(), [{"input_ids": ids, "attention_mask": None}]) == masks_of(llama(), [ids])


def test_keys_of_other_names_are_shown_and_a_decoder_needs_its_own(tmp_path):
    ids, mask = padded()
    given = [{"ids": ids, "mask": mask}]
    with pytest.raises(ValueError, match=r"must hold input_ids.*got \['ids', 'mask'\]"):
        fit(Boring(), tmp_path, DataLoader(TensorDataset(ids)), batches=given)
    torch.manual_seed(0)
    t5 = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).eval()
    with pytest.raises(ValueError, match=r"hold nothing for its decoder: give labels or decoder_input_ids too"):
        masks_of(t5, [ids], blocks="encoder.block")
    with pytest.raises(ValueError, match=r"hold nothing for its decoder: give labels or decoder_input_ids too"):
        masks_of(t5, [ids])


def test_evaluation_windows_of_another_tokenizer_are_refused():
    with pytest.raises(ValueError, match=r"the evaluation windows have token ids from 0 to 150, and LlamaForCausalLM"):
        perplexity(llama(), torch.arange(151)[None, ::5], progress=False)
