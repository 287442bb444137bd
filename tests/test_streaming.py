"""A checkpoint pruned one block at a time: the result, what is held meanwhile, being killed, and bad folders."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import stat
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import hydra
import pytest
import torch
from hydra.errors import InstantiationException
from launch import started, train
from runs import words
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from prune_callbacks import (
    MRP,
    NM,
    Columns,
    Magnitude,
    MaskSet,
    SparseGPT,
    SparseGPTQ,
    Structured,
    Unstructured,
    Wanda,
    prune_checkpoint,
    prune_sequentially,
)
from prune_callbacks.reporting.comparison import main as comparison_main
from prune_callbacks.reporting.pictures import compare
from prune_callbacks.reporting.summary import summary_table
from prune_callbacks.solvers import Grid
from prune_callbacks.storage.run_folder import read_run
from prune_callbacks.storage.run_record import RunRecord
from prune_callbacks.streaming import files, walk
from prune_callbacks.streaming.source import CheckpointFolder
from prune_callbacks.tasks import byte_tokenizer, tiny_llama

SPARSEGPT = SparseGPT(Unstructured(0.5))
INDEX = "model.safetensors.index.json"


def llama(**changes):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | changes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def opt():
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16))


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "bfloat16": lambda: llama().to(torch.bfloat16),
    "sliding": lambda: tiny_llama(hidden_size=32, layers=2),
    "gpt2": gpt2,
    "opt": opt,
}


def saved(folder, model, **settings):
    model.save_pretrained(folder, **settings)
    return folder


@pytest.fixture
def source(tmp_path):
    """Three blocks in several files, and a tokenizer."""
    folder = saved(tmp_path / "source", llama(), max_shard_size="10KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def batches():
    return list(torch.randint(3, 60, (6, 24)).split(2))


def prune(source, target, batches, pruner=SPARSEGPT, **settings):
    return prune_checkpoint(source, target, pruner, batches, progress=False, **settings)


def in_memory(source, batches, pruner=SPARSEGPT, **settings):
    model = AutoModelForCausalLM.from_pretrained(source)
    return model, prune_sequentially(model, batches, pruner, progress=False, **settings)


def same(source, target, batches, pruner=SPARSEGPT, **settings):
    """Whether the target is what pruning the loaded model makes."""
    model, report = in_memory(source, batches, pruner, **settings)
    streamed = AutoModelForCausalLM.from_pretrained(target / "model")
    state = streamed.state_dict()
    assert streamed.dtype == model.dtype
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert MaskSet.load(target / "masks.safetensors") == report.masks
    return report


def content(folder):
    """The hash of every file but the report, of which times and memory are left out."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "report.json":
            record = json.loads(data)
            layers = [layer | {"seconds": None} for layer in record["layers"]]
            data = json.dumps(record | {"seconds": None, "peak_memory_bytes": None, "layers": layers}).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pruner", [SPARSEGPT, Wanda(NM(2, 4))], ids=["SparseGPT", "Wanda"])
def test_it_is_what_pruning_the_loaded_model_makes(tmp_path, batches, kind, pruner):
    source = saved(tmp_path / "source", MODELS[kind]())
    record = prune(source, tmp_path / "target", batches, pruner)
    report = same(source, tmp_path / "target", batches, pruner)
    assert record["sparsity"]["achieved"] == pytest.approx(report.sparsity)
    assert record["reconstruction_loss"] == {layer.name: layer.relative_loss for layer in report.layers}
    assert record["violations"] == {}


@pytest.mark.parametrize("pruner", [Magnitude(Unstructured(0.5)), SPARSEGPT, Wanda(NM(2, 4)), MRP(NM(2, 4))], ids=repr)
def test_every_pruner_from_several_files(tmp_path, source, batches, pruner):
    assert len(list(source.glob("*.safetensors"))) > 2
    prune(source, tmp_path / "target", batches, pruner)
    same(source, tmp_path / "target", batches, pruner)


@pytest.mark.filterwarnings("ignore:.*(calibration tokens|routers stay dense)")
@pytest.mark.parametrize("pruner", [SPARSEGPT, Wanda(NM(1, 4))], ids=["SparseGPT", "Wanda"])
def test_experts_in_one_tensor(tmp_path, batches, pruner):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = MixtralForCausalLM(MixtralConfig(**sizes | heads, num_local_experts=4))
    source = saved(tmp_path / "source", model, save_original_format=False)
    record = prune(source, tmp_path / "target", batches, pruner, min_expert_tokens=60)
    report = same(source, tmp_path / "target", batches, pruner, min_expert_tokens=60)
    assert len(report.layers) == 2 * (4 + 2 * 4)
    assert record["sparsity"]["layers"] == pytest.approx(report.masks.layer_sparsity())
    assert 0 < len(record["by_magnitude"]) < 2 * 2 * 4
    assert record["by_magnitude"] == report.by_magnitude
    assert record["skipped"] == report.skipped
    assert record["violations"] == {}


def test_of_the_embeddings_only_the_rows_of_the_windows_are_held(tmp_path, batches, monkeypatch):
    seen = []
    store = walk.store_inputs

    def spy(model, *rest):
        seen.append(len(model.get_input_embeddings().weight))
        return store(model, *rest)

    monkeypatch.setattr(walk, "store_inputs", spy)
    source = saved(tmp_path / "source", llama(vocab_size=5000))
    prune(source, tmp_path / "target", batches)
    assert seen == [len(torch.cat(batches).unique())]
    same(source, tmp_path / "target", batches)


def test_padding_and_windows_of_several_lengths(tmp_path, source):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :7] = 0
    batches = [
        {"input_ids": torch.randint(3, 60, (2, 24)), "attention_mask": mask},
        {"input_ids": torch.randint(3, 60, (1, 40))},
    ]
    prune(source, tmp_path / "target", batches)
    same(source, tmp_path / "target", batches)


def test_names_without_the_prefix_of_the_language_model(tmp_path, batches):
    """The published GPT-2 is of the model without its head, with the causal masks of old."""
    source = saved(tmp_path / "source", gpt2())
    weights = load_file(source / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    plain["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(plain, source / "model.safetensors", metadata={"format": "pt"})
    prune(source, tmp_path / "target", batches)
    same(source, tmp_path / "target", batches)


def test_only_targets_are_pruned_and_later_blocks_only_copied(tmp_path, source, batches, monkeypatch):
    run = []
    original = walk.store_next
    monkeypatch.setattr(walk, "store_next", lambda index, *args: run.append(index) or original(index, *args))
    prune(source, tmp_path / "target", batches, targets="model.layers.1.mlp.*")
    same(source, tmp_path / "target", batches, targets="model.layers.1.mlp.*")
    assert run == [0]


def test_another_dtype(tmp_path, source, batches):
    prune(source, tmp_path / "target", batches, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    report = prune_sequentially(model, batches, SPARSEGPT, progress=False)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "target/model")
    assert streamed.dtype == torch.bfloat16
    assert all(torch.equal(t, streamed.state_dict()[n]) for n, t in model.state_dict().items())
    assert MaskSet.load(tmp_path / "target/masks.safetensors") == report.masks


def test_scales_of_weights_that_are_rounded_too(tmp_path, source, batches):
    pruner = SparseGPTQ(NM(2, 4), Grid(4, 16))
    prune(source, tmp_path / "target", batches, pruner)
    report = same(source, tmp_path / "target", batches, pruner)
    scales = load_file(tmp_path / "target/scales.safetensors")
    assert scales.keys() == report.scales.keys()
    assert all(torch.equal(scale, scales[name]) for name, scale in report.scales.items())


def test_the_folder_is_that_of_a_run(tmp_path, source, batches):
    before = content(source)
    target = tmp_path / "target"
    record = prune(source, target, batches)
    assert {path.name for path in target.iterdir()} == {"model", "masks.safetensors", "report.json"}
    assert content(source) == before
    assert json.loads((target / "report.json").read_text()) == record
    config = json.loads((target / "model/config.json").read_text())
    in_memory(source, batches)[0].save_pretrained(tmp_path / "other")
    assert config == json.loads((tmp_path / "other/config.json").read_text())
    assert (target / "model/tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    files = json.loads((target / "model" / INDEX).read_text())["weight_map"]
    assert files["model.layers.1.mlp.up_proj.weight"] == "model-00002-of-00004.safetensors"
    assert "model, 3 blocks" not in read_run(target).architecture
    assert read_run(target).missing == ()  # it neither trains nor measures


def test_one_block_at_a_time_has_values(tmp_path, source, batches, monkeypatch):
    held = []
    original = CheckpointFolder.read

    def spy(checkpoint, names):
        held.append(sum(any(not p.is_meta for p in block.parameters()) for block in walks[0]))
        return original(checkpoint, names)

    walks = []
    start = walk.BlockWalk.run
    monkeypatch.setattr(
        walk.BlockWalk, "run", lambda self, *args: walks.append([b for _, b in self.blocks]) or start(self, *args)
    )
    monkeypatch.setattr(CheckpointFolder, "read", spy)
    prune(source, tmp_path / "target", batches)
    assert held == [0] * 4  # the first one is read for the capture too
    assert all(p.is_meta for block in walks[0] for p in block.parameters())


def test_arguments_of_blocks_that_are_the_same_for_all_windows_are_held_once(tmp_path, source, batches, monkeypatch):
    seen = []
    original = walk.store_inputs
    monkeypatch.setattr(walk, "store_inputs", lambda *args: seen.append(original(*args)) or seen[-1])
    prune(source, tmp_path / "target", batches)
    (inputs,) = seen
    tables = {id(batch.calls[index][1]["position_embeddings"][0]) for batch in inputs for index in range(3)}
    assert len(inputs) == 3
    assert len(tables) == 1


class _CrashError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture
def crash(monkeypatch):
    """Ends the call at the n-th operation on files, and counts them."""
    state = {"count": 0, "at": None}

    def wrap(owner, name):
        original = getattr(owner, name)

        def operation(path, *args, **kwargs):
            state["count"] += 1
            if state["count"] == state["at"]:
                if name == "rmtree":  # in the middle of it
                    next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
                elif name == "replace" and Path(path).is_file():  # in the middle of writing it
                    os.truncate(path, Path(path).stat().st_size // 2)
                raise _CrashError
            return original(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, operation)

    # Between two of these the folder does not change, but for files under temporary names. What is written is there
    # after a kill without fsync, which only makes power failures harmless.
    for owner, name in ((os, "replace"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree")):
        wrap(owner, name)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return state


@pytest.mark.parametrize("pruner", [SPARSEGPT, Magnitude(NM(2, 4))], ids=["SparseGPT", "Magnitude"])
def test_a_call_that_goes_on_after_a_crash_anywhere_ends_the_same(tmp_path, crash, pruner):
    source = saved(tmp_path / "source", llama(num_hidden_layers=2))
    batches, targets = [torch.randint(3, 60, (2, 24))], "down_proj"
    crash["count"] = 0
    prune(source, tmp_path / "whole", batches, pruner, targets=targets)
    operations, wanted = crash["count"], content(tmp_path / "whole")
    assert operations > 20
    for at in range(1, operations + 1):
        target = tmp_path / f"target_{at}"
        crash.update(count=0, at=at)
        with pytest.raises(_CrashError):
            prune(source, target, batches, pruner, targets=targets)
        crash["at"] = None
        prune(source, target, batches, pruner, targets=targets)
        assert content(target) == wanted, at
        shutil.rmtree(target)


def test_finished_blocks_are_not_done_again(tmp_path, source, batches, monkeypatch):
    pruned = []
    original = walk.collect

    def spy(statistic, index, *args):
        if len(pruned) == 2:
            pruned.append("stopped")
            raise _CrashError
        pruned.append(index)
        return original(statistic, index, *args)

    monkeypatch.setattr(walk, "collect", spy)
    with pytest.raises(_CrashError):
        prune(source, tmp_path / "target", batches)
    assert sorted(p.name for p in (tmp_path / "target/streaming").glob("hidden*")) == ["hidden_00002"]
    prune(source, tmp_path / "target", batches)
    assert pruned == [0, 1, "stopped", 2]
    same(source, tmp_path / "target", batches)
    monkeypatch.setattr(walk.BlockWalk, "run", None)  # it has come to its end, and is not begun again
    first = json.loads((tmp_path / "target/report.json").read_text())
    assert prune(source, tmp_path / "target", batches) == first


SCRIPT = """
import sys, time, torch
from prune_callbacks import SparseGPT, Unstructured, prune_checkpoint
from prune_callbacks import writing
original = writing.rename
def slow(*names, **durable):  # so that the one who kills has time to
    time.sleep(0.05)
    original(*names, **durable)
writing.rename = slow
prune_checkpoint(sys.argv[1], sys.argv[2], SparseGPT(Unstructured(0.5)), list(torch.load(sys.argv[3])), progress=False)
"""


def test_killed_processes_lose_nothing(tmp_path, source, batches):
    target = tmp_path / "target"
    torch.save(batches, tmp_path / "batches.pt")
    prune(source, tmp_path / "whole", batches)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for trace in ("streaming/hidden_00000", "streaming/block_00001.json"):
        with started(script, source, target, tmp_path / "batches.pt") as process:
            give_up = time.monotonic() + 60
            while not (target / trace).exists():
                assert process.poll() is None, process.output
                assert time.monotonic() < give_up
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait().returncode == -signal.SIGKILL
        assert not (target / "report.json").exists()
    prune(source, target, batches)
    assert content(target) == content(tmp_path / "whole")


def refuses(source, target, batches, match, pruner=SPARSEGPT, **settings):
    before = content(source) if source.is_dir() else None
    with pytest.raises(ValueError, match=match):
        prune(source, target, batches, pruner, **settings)
    assert before is None or content(source) == before


def test_another_setting_is_refused_and_says_what_differs(tmp_path, source, batches):
    target = tmp_path / "target"
    prune(source, target, batches)
    wanted = content(target)
    refuses(source, target, batches, r"another setting: pruner was SparseGPT.* and is Wanda", Wanda(NM(2, 4)))
    refuses(source, target, batches[:2], r"another setting: batches were 3 \(among them \w+\) and are 2\.")
    refuses(
        source,
        target,
        batches,
        r"another setting: targets were 21 \(among them model.layers.0.self_attn.q_proj, .* and 9 more\) and are 9",
        targets="*.mlp.*",
    )
    refuses(source, target, batches[::-1], "batches were 3 and are 3, in another order or repeated")
    refuses(source, target, batches, "another setting: min_expert_tokens was 32 and is 8", min_expert_tokens=8)
    refuses(source, target, batches, "another setting: dtype was torch.float32 and is torch.float16", dtype="float16")
    torch.manual_seed(1)
    shutil.rmtree(source)
    saved(source, llama(), max_shard_size="10KB")
    refuses(source, target, batches, r"another setting: source: model-0000.-of-0000..safetensors was")
    assert content(target) == wanted


def test_a_target_that_holds_something_else_is_refused(tmp_path, source, batches):
    (tmp_path / "target/model").mkdir(parents=True)
    refuses(source, tmp_path / "target", batches, r"already holds something else \(model\), which is not written over")
    (tmp_path / "file").touch()
    refuses(source, tmp_path / "file", batches, "target .*file is a file; name a folder")


def test_the_source_is_no_target(tmp_path, source, batches):
    refuses(source, source, batches, "is the source or inside of it")
    refuses(source, source / "pruned", batches, "is the source or inside of it")
    (tmp_path / "link").symlink_to(source)
    refuses(source, tmp_path / "link", batches, "is the source or inside of it")


def test_two_processes_do_not_write_into_one_folder(tmp_path, source, batches):
    from prune_callbacks.streaming.together import alone

    with alone(tmp_path / "target"):
        refuses(source, tmp_path / "target", batches, "another process is pruning into .*target; wait for it")


def test_damaged_files_are_named(tmp_path, source, batches):
    target = tmp_path / "target"
    shard = sorted(source.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    for damaged in (data[:-100], data[:4], b"\xff" * 8 + data[8:], b""):
        shard.write_bytes(damaged)
        refuses(
            source, target, batches, rf"{shard.name} is no complete safetensors file .* truncated or damaged; download"
        )
    shard.unlink()
    refuses(source, target, batches, rf"{shard.name} is missing, and {INDEX} says that it has tensors")
    shard.write_bytes(data)
    index = json.loads((source / INDEX).read_text())
    lost = dict(index["weight_map"], nothing=shard.name)
    (source / INDEX).write_text(json.dumps({"weight_map": lost}))
    refuses(source, target, batches, rf"1 tensors are missing, first nothing: .* says that it is in .*{shard.name}")
    (source / INDEX).write_text("{")
    refuses(source, target, batches, f"{INDEX} is damaged: ")
    assert not target.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, source, batches):
    refuses(tmp_path / "none", tmp_path / "target", batches, "source .*none does not exist; name a folder")
    refuses(source / "config.json", tmp_path / "target", batches, "config.json is a file; name a folder")
    for path in (*source.glob("*.safetensors"), source / INDEX):
        path.unlink()
    refuses(source, tmp_path / "target", batches, f"holds neither model.safetensors nor {INDEX}. write|nor .* write")
    torch.save({}, source / "pytorch_model.bin")
    refuses(source, tmp_path / "target", batches, "it has pytorch_model.bin. Pickles can run code and are never loaded")
    (source / "adapter_config.json").write_text("{}")
    refuses(source, tmp_path / "target", batches, "holds adapters .*: merge them into the model")
    (source / "adapter_config.json").unlink()
    (source / "config.json").unlink()
    refuses(source, tmp_path / "target", batches, "there is no config.json in")


def test_quantized_weights_are_refused(tmp_path, batches):
    source = saved(tmp_path / "source", llama())
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, source / "model.safetensors", metadata={"format": "pt"})
    refuses(source, tmp_path / "target", batches, f"{name} in .*model.safetensors is I8; quantized weights cannot be")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refuses(source, tmp_path / "target", batches, r"is quantized \(quantization_config in config.json: gptq\)")


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path, batches):
    source = saved(tmp_path / "source", llama())
    weights = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    wrong = weights | {name: torch.zeros(16, 33)}
    save_file(wrong, source / "model.safetensors", metadata={"format": "pt"})
    refuses(source, tmp_path / "target", batches, rf"{name} in .* has shape \(16, 33\), and config.json makes .*16, 32")
    save_file({n: w for n, w in weights.items() if n != name}, source / "model.safetensors", metadata={"format": "pt"})
    refuses(source, tmp_path / "target", batches, f"has no {name}, which LlamaForCausalLM of its config.json needs")
    save_file(weights | {"other": torch.zeros(3)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(
        UserWarning, match="1 tensors of .* are no weights of LlamaForCausalLM and are left out, first oth"
    ):
        prune(source, tmp_path / "target", batches)


def test_weights_that_are_said_to_be_tied_and_are_not(tmp_path, batches):
    source = saved(tmp_path / "source", llama(tie_word_embeddings=True))
    weights = load_file(source / "model.safetensors")
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(both, source / "model.safetensors", metadata={"format": "pt"})
    prune(source, tmp_path / "target", batches)
    same(source, tmp_path / "target", batches)
    both["lm_head.weight"][3, 4] += 1
    save_file(both, source / "model.safetensors", metadata={"format": "pt"})
    refuses(source, tmp_path / "other", batches, "config.json ties .*embed_tokens.weight and lm_head.weight, and")


def test_bad_calls_are_refused_before_work(tmp_path, source, batches, unchecked):
    target = tmp_path / "target"
    refuses(source, target, batches, "Structured removes units from layers of all", Structured(Columns(0.25)))
    refuses(source, target, None, "SparseGPT needs calibration batches, got None")
    refuses(source, target, [torch.rand(1, 8)], r"must hold input_ids, integers of shape .* got Tensor \(1, 8\)")
    refuses(source, target, [*batches, torch.tensor([[3, 64]])], "token ids from 3 to 64, and Llama.* for 0 to 63")
    refuses(source, target, [*batches, torch.tensor([[-1, 6]])], "token ids from -1 to 6, and Llama.* for 0 to 63")
    refuses(source, target, batches, "device='gpu' is unknown to torch", device="gpu")
    refuses(source, target, batches[0], r"got one tensor of shape \(2, 24\); split it")
    refuses(source, target, batches, "target 'nothing' matches no layer", targets=["nothing"])
    refuses(source, target, batches, r"layer model.layers.0.self_attn.q_proj: NM\(2, 5\) needs", Wanda(NM(2, 5)))
    refuses(
        source, target, batches, "dtype is one of torch's, such as 'bfloat16', got 'half a byte'", dtype="half a byte"
    )
    assert not target.exists()
    refuses(source, target, [], "there is no calibration batch")


def test_weights_that_are_not_finite_name_the_layer_and_keep_what_is_done(tmp_path, batches):
    source = saved(tmp_path / "source", llama())
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][2, 3] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    refuses(source, tmp_path / "target", batches, "layer model.layers.1.mlp.down_proj: .*NaN")
    assert (tmp_path / "target/streaming/block_00000.json").exists()
    assert not (tmp_path / "target/streaming/block_00001.json").exists()


def test_a_disk_without_room_is_noticed_before_work(tmp_path, source, batches, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    refuses(source, tmp_path / "target", batches, r"has 0.00 GB free, and 0.00 GB are needed: .* Make room")


def test_a_full_disk_loses_nothing(tmp_path, source, batches, monkeypatch):
    prune(source, tmp_path / "whole", batches)
    original, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > full.after:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for full.after in (20, 30):
        calls.clear()
        refuses(source, tmp_path / "target", batches, "the disk is full .* Finished blocks are kept: make room")
    monkeypatch.setattr(os, "fsync", original)
    assert (tmp_path / "target/streaming/block_00000.json").exists()
    prune(source, tmp_path / "target", batches)
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    done, synced, renamed = [], os.fsync, Path.replace

    def sync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        synced(descriptor)

    def replace(old, new):
        done.append("renamed")
        return renamed(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    with files.writing(tmp_path / "target") as file:
        file.write(b"content")
        assert list(tmp_path.iterdir()) == [Path(file.name)] != [tmp_path / "target"]
    assert done == ["file", "renamed", "folder"]
    assert (tmp_path / "target").read_bytes() == b"content"


def test_progress_is_shown(tmp_path, source, batches, capsys):
    prune_checkpoint(source, tmp_path / "target", SPARSEGPT, batches)
    assert "21/21 layers" in capsys.readouterr().out


def test_the_recipe_prunes_a_tiny_checkpoint_and_goes_on(tmp_path, capsys, monkeypatch):
    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("train", root / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe=prune_streaming", "smoke=true", f"output_dir={folder}"])
    with hydra.initialize_config_dir(str(root / "recipes"), version_base="1.3"):
        for _ in range(2):  # the second time it has come to its end
            train.run(["recipe=prune_streaming", "smoke=true", f"output_dir={folder}"])
            assert "50.00% zeros in 28 layers" in capsys.readouterr().out
        for given, name in (("allocation=owl", "allocation"), ("evaluate=[python_docs]", "evaluate")):
            with pytest.raises(InstantiationException, match=f"{name} need the whole model, and prune_streaming has"):
                train.run(["recipe=prune_streaming", "smoke=true", given, f"output_dir={tmp_path / name}"])
        with pytest.raises(ValueError, match="recipe=prune_streaming needs source=..."):
            train.run(["recipe=prune_streaming", f"output_dir={tmp_path / 'other'}"])
    assert {"model", "masks.safetensors", "report.json", "config.yaml"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert report["recipe"] == "prune_streaming"
    assert report["command"] == "python train.py recipe=prune_streaming smoke=true"
    page = words((folder / "report.html").read_text(encoding="utf-8"))
    assert "one block of the model in memory at a time, and trained nothing. Folder" in page
    assert "python train.py recipe=prune_streaming smoke=true" in page
    assert len(report["sparsity"]["layers"]) == 4 * 7
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert MaskSet.load(folder / "masks.safetensors").violations(model.named_parameters()) == {}


class _StoppedError(Exception):
    pass


def stopped_after(source, target, batches, count, monkeypatch):
    """A run that ends after so many blocks."""
    commit = walk.Journal.commit

    def stop(journal, record):
        commit(journal, record)
        if len(journal.records) == count:
            raise _StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(walk.Journal, "commit", stop)
        with pytest.raises(_StoppedError):
            prune(source, target, batches)


def test_warnings_are_in_the_report_those_of_a_stopped_call_too(tmp_path, source, batches, monkeypatch):
    few = [batches[0][:1]]
    with pytest.warns(UserWarning, match="24 calibration tokens"):
        heard = prune(source, tmp_path / "whole", few)["warnings"]
    assert len(heard) == 1
    assert "for the 32 input features of model.layers.0.mlp.down_proj" in heard[0]
    with pytest.warns(UserWarning, match="24 calibration tokens"):
        stopped_after(source, tmp_path / "target", few, 1, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nor is what was said before said again
        assert prune(source, tmp_path / "target", few)["warnings"] == heard
    assert prune(source, tmp_path / "quiet", batches)["warnings"] == []


def test_what_was_lost_between_two_calls_is_noticed(tmp_path, source, batches, monkeypatch):
    target = tmp_path / "target"
    lost = {
        "model.partial/model-00001-of-00004.safetensors": "of block 0, which was finished, is missing",
        "streaming/masks_00001.safetensors": "of block 1, which was finished, is missing",
        "streaming/hidden_00002": "hidden_00002 is missing, with the hidden states that enter block 2",
    }
    for name, message in lost.items():
        shutil.rmtree(target, ignore_errors=True)
        stopped_after(source, target, batches, 2, monkeypatch)
        (target / name).rename(tmp_path / "away")
        refuses(source, target, batches, message)
        (tmp_path / "away").rename(target / name)
    hidden = sorted((target / "streaming/hidden_00002").iterdir())[-1]
    states = hidden.read_bytes()
    for damage in (hidden.unlink, lambda: hidden.write_bytes(states[:100])):
        damage()
        refuses(source, target, batches, f"{hidden.name}, with hidden states that enter a block, is missing or damaged")
        hidden.write_bytes(states)
    shard = target / "model.partial/model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    refuses(source, target, batches, f"which was finished, has {len(whole) - 10} bytes instead of {len(whole)}")
    shard.write_bytes(whole)
    report = prune(source, target, batches)  # with all of it back it goes on
    same(source, target, batches)
    assert prune(source, target, batches) == report
    (target / "model/model-00003-of-00004.safetensors").unlink()
    refuses(source, target, batches, "model-00003-of-00004.safetensors of the finished model is missing")
    shutil.rmtree(target)
    prune(source, target, batches)
    (target / "model/config.json").rename(tmp_path / "away")
    refuses(source, target, batches, r"config.json of the finished model is missing in .*/target: it was changed")
    (tmp_path / "away").rename(target / "model/config.json")
    (target / "masks.safetensors").write_bytes(b"")
    refuses(source, target, batches, r"masks.safetensors of the finished model has 0 bytes instead of \d+")


def test_a_source_that_changed_in_place_is_refused(tmp_path, source, batches, monkeypatch):
    target = tmp_path / "target"
    stopped_after(source, target, batches, 1, monkeypatch)
    shard = sorted(source.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    refuses(source, target, batches, f"another setting: source: {shard.name} was")


def test_the_report_has_what_reports_have(tmp_path, source, batches, capsys):
    record = prune(source, tmp_path / "target", batches)
    read = RunRecord.from_json(record)
    assert read.to_json() == record
    summary_table(read)
    compare({"one": read, "two": read}, tmp_path / "compared.png")
    assert comparison_main([str(tmp_path / "target"), "--output", str(tmp_path / "page.html")]) == 0
    assert "two" in capsys.readouterr().out


def test_a_streamed_run_is_a_complete_one(tmp_path, source, batches):
    prune(source, tmp_path / "target", batches)
    assert read_run(tmp_path / "target").missing == ()


def test_no_batches_leave_no_trace(tmp_path, source, batches):
    refuses(source, tmp_path / "target", [], "there is no calibration batch")
    assert not (tmp_path / "target").exists()
    prune(source, tmp_path / "target", batches)


def test_the_recipe_says_what_is_wrong_with_its_source(tmp_path):
    done = train("recipe=prune_streaming", f"source={tmp_path / 'nothing'}", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "nothing does not exist; name a folder with config.json" in " ".join(done.output.split())


def test_a_file_system_without_locks(tmp_path, source, batches, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"):
        prune(source, tmp_path / "target", batches)
    same(source, tmp_path / "target", batches)
