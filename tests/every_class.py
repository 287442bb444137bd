"""
Every causal-LM class of the installed transformers that can be built small: is it pruned as re-running it would?

    python tests/every_class.py        write docs/families.md, and print the line that the README quotes

A small configuration is made of the class's own: every size that it has and that is larger is set to a small one.
"""

import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from topologies import rerun_masks
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prune_callbacks import Unstructured, Wanda, prune_checkpoint, prune_sequentially
from prune_callbacks.anatomy.blocks import find_blocks
from prune_callbacks.anatomy.targets import find_targets
from prune_callbacks.streaming.journal import Journal

PRUNER = Wanda(Unstructured(0.5))
LARGEST = 30_000_000
"""Parameters of the largest model that is tried."""

IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WIDTHS = ("hidden_size", "n_embd", "d_model", "emb_dim", "dim_model", "lru_width")
INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dim_ff", "ffn_hidden_size")
INNER += ("encoder_ffn_dim", "decoder_ffn_dim")
EXPERT = ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size")
EXPERT += ("moe_shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank", "mamba_d_head", "mamba_head_dim")
EXPERT += ("mamba_chunk_size", "chunk_size", "attention_window_size", "sliding_window")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
FOUR = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
FOUR += ("head_dim", "dim_head", "d_kv", "rotary_dim", "num_experts", "num_local_experts", "n_routed_experts")
FOUR += ("moe_num_experts", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "mamba_n_heads", "mamba_num_heads")
FOUR += ("mamba_d_state", "state_size", "global_head_dim", "hidden_size_per_layer_input", "laurel_rank")
FOUR += ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
TWO = ("num_key_value_heads", "num_experts_per_tok", "num_global_key_value_heads", "linear_num_key_heads")
ONE = ("n_groups", "mamba_n_groups", "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace")
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
SIZES = {"vocab_size": 64, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}
SIZES |= dict.fromkeys(WIDTHS, 16) | dict.fromkeys(INNER, 32) | dict.fromkeys(EXPERT, 8) | dict.fromkeys(LAYERS, 2)
SIZES |= dict.fromkeys(FOUR, 4) | dict.fromkeys(TWO, 2) | dict.fromkeys(ONE, 1) | dict.fromkeys(POSITIONS, 64)

SPECIAL = {
    "NemotronConfig": {"num_key_value_heads": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "XmodConfig": {"default_language": "en_XX"},
    "ProphetNetConfig": {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_hidden_layers": None},
}
"""What some configurations need besides."""


class Outcome(NamedTuple):
    """What became of a class."""

    kind: str  # "chain", "whole model", "refused" or an error
    reason: str = ""
    streamed: str = ""  # "same bytes", "refused" or an error


def classes():
    """The configuration classes, in transformers' order, each once."""
    return list(dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING.keys()))


def _had(config, name):
    try:
        return getattr(config, name, None)
    except Exception:  # a configuration whose layers differ does not say
        return sys.maxsize


def settings(kind):
    """The small settings of a configuration class."""
    base, names = kind(), getattr(kind, "attribute_map", {})
    latent = isinstance(_had(base, "qk_rope_head_dim"), int)  # its heads are all key-value heads, of two parts
    found = {}
    for name, size in (SIZES | IDS).items():
        own = names.get(name, name)
        place = getattr(kind, own, None)
        if own in found or (isinstance(place, property) and place.fset is None) or (latent and name == "head_dim"):
            continue
        size = 4 if latent and name == "num_key_value_heads" else size
        before = _had(base, own)
        if hasattr(type(base), own) or before is not None:
            large = isinstance(before, int) and not isinstance(before, bool) and before > size
            found |= {own: size} if large or (name in IDS and before is not None) else {}
    types, place = _had(base, "layer_types"), getattr(kind, "layer_types", None)
    if isinstance(types, list) and not (isinstance(place, property) and place.fset is None):
        once = list(dict.fromkeys(types))
        found["layer_types"] = once if len(once) > 1 else once * 2
        found |= {"num_hidden_layers": len(found["layer_types"])} if "num_hidden_layers" in found else {}
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        try:
            found[name] = settings(part)
        except Exception:  # a part that has no default
            continue
    return {name: value for name, value in (found | SPECIAL.get(kind.__name__, {})).items() if value is not None}


def build(kind) -> PreTrainedModel | None:
    """The small model, whose blocks change what passes through them; None where it cannot be built or run."""
    try:
        config = kind(**settings(kind))
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            return None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
            model(input_ids=torch.randint(3, 61, (2, 12)), use_cache=False)
    except Exception:  # transformers' own, before anything of ours
        return None
    return model


def windows():
    """Calibration windows."""
    return list(torch.randint(3, 61, (3, 2, 24), generator=torch.Generator().manual_seed(1)))


def in_double(model):
    """The model in float64 if it runs so: masks do not hang on rounding then."""
    wide = copy.deepcopy(model).double()
    try:
        with torch.no_grad():
            wide(input_ids=windows()[0], use_cache=False)
    except RuntimeError:
        return copy.deepcopy(model)
    return wide


def order_of(model, blocks):
    """The names of the blocks in the order in which a forward pass calls them."""
    called = []
    hooks = [block.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, block in blocks]
    with torch.no_grad():
        model(input_ids=windows()[0], use_cache=False)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(called))


def check(kind, model) -> Outcome:
    """Prunes the linear layers by Wanda, in memory and from files, and compares; AssertionError if they differ."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            pruned = in_double(model)
            layers = list(find_targets(find_blocks(pruned)))  # experts stay as they are: the reference knows layers
            report = prune_sequentially(pruned, windows(), PRUNER, targets=layers, progress=False)
        except ValueError as error:
            return Outcome("refused", str(error))
    reasons = [str(w.message) for w in heard if "runs again for every block" in str(w.message)]
    reference = in_double(model)
    batches = [{"input_ids": ids, "use_cache": False} for ids in windows()]
    expected = rerun_masks(reference, order_of(reference, find_blocks(reference)), batches, only=layers)
    for name, keep in expected.items():
        assert torch.equal(report.masks[name], keep), name
    unnamed = [name for name in layers if f"{name}.weight" not in {*report.masks, *report.skipped}]
    assert not unnamed, f"neither pruned nor named: {unnamed}"
    return Outcome("whole model" if reasons else "chain", *(reasons[:1] or [""]), streamed=check_streamed(model))


class _KilledError(BaseException):
    """Stands for a kill."""


def check_streamed(model) -> str:
    """Prunes from files, once killed after the first block and resumed; AssertionError if the bytes are others."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        model.save_pretrained(folder / "source")
        try:
            prune_checkpoint(folder / "source", folder / "whole", PRUNER, windows(), progress=False)
        except ValueError:
            assert not (folder / "whole").exists()
            return "refused"
        loaded = type(model).from_pretrained(folder / "source", dtype=torch.float32).eval()
        report = prune_sequentially(loaded, windows(), PRUNER, progress=False)
        streamed = type(model).from_pretrained(folder / "whole/model", dtype=torch.float32)
        state = streamed.state_dict()
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, state[key]), f"streamed: {key}"
        assert report.masks.violations(streamed.named_parameters()) == {}
        commit, seen = Journal.commit, []

        def killed(journal, record):
            seen.append(record)
            if len(seen) == 1:
                raise _KilledError
            commit(journal, record)

        Journal.commit = killed
        try:
            for _ in range(2):
                try:
                    prune_checkpoint(folder / "source", folder / "again", PRUNER, windows(), progress=False)
                except _KilledError:
                    continue
        finally:
            Journal.commit = commit
        for path in (folder / "whole/model").glob("*.safetensors"):
            assert path.read_bytes() == (folder / "again/model" / path.name).read_bytes(), path.name
    return "same bytes"


PAGE = """\
# Families

What `python tests/every_class.py` found with transformers {version}: {line}.

Of every class of transformers' causal-LM mapping that can be built with fewer than {largest} M parameters, the linear
layers of all blocks are pruned by Wanda to 50 % and compared with running the whole model again for every block,
written without this package. "Chain": the blocks run one after another, each once. "Whole model": they do not form a
chain, and the model runs again for every block. "From files": `prune_checkpoint` writes the same weights, and the same
bytes after a kill; or it refuses the model before the target is begun.

| configuration | blocks | from files | reason |
|---|---|---|---|
{rows}
"""


def main():
    """Writes the page and prints the line that the README quotes."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = {}
    for kind in classes():
        model = build(kind)
        if model is not None:
            found[kind.__name__] = check(kind, model)
            print(kind.__name__, *found[kind.__name__], flush=True)
    rows = "\n".join(
        f"| {name.removesuffix('Config')} | {o.kind} | {o.streamed or '-'} | {o.reason} |"
        for name, o in sorted(found.items())
    )
    line = summary(found)
    page = PAGE.format(version=transformers.__version__, line=line, largest=LARGEST // 10**6, rows=rows)
    (Path(__file__).parents[1] / "docs/families.md").write_text(page)
    print(line)


def summary(found):
    """The line of counts."""
    kinds = [outcome.kind for outcome in found.values()]
    files = [outcome.streamed for outcome in found.values()]
    return (
        f"of {len(found)} classes {kinds.count('chain')} are pruned block by block and {kinds.count('whole model')} by "
        f"running the whole model again, all with the same masks as the reference, and {kinds.count('refused')} are "
        f"refused by name; {files.count('same bytes')} are also pruned from files"
    )


if __name__ == "__main__":
    main()
