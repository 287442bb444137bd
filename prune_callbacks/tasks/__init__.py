"""What is trained and on what: a causal LM module, token windows, corpora and ready models."""

from prune_callbacks.tasks.causal_lm import CausalLM
from prune_callbacks.tasks.corpora import HubText, PythonDocs, TextFile
from prune_callbacks.tasks.data import TokenDataModule
from prune_callbacks.tasks.models import byte_tokenizer, smollm2_135m, tiny_llama

__all__ = [
    "CausalLM",
    "HubText",
    "PythonDocs",
    "TextFile",
    "TokenDataModule",
    "byte_tokenizer",
    "smollm2_135m",
    "tiny_llama",
]
