"""Models and data for training and measuring: a causal LM module, token windows, corpora and ready models."""

from prune_callbacks.tasks.causal_lm import CausalLM
from prune_callbacks.tasks.corpora import HubText, PythonDocs, TextFile
from prune_callbacks.tasks.data import TokenDataModule
from prune_callbacks.tasks.models import byte_tokenizer, smollm2_135m, tiny_checkpoint, tiny_llama
from prune_callbacks.tasks.named_corpora import corpus
from prune_callbacks.tasks.objectives import LanguageModeling, LogitsDistillation, Objective, SquareHead

__all__ = [
    "CausalLM",
    "HubText",
    "LanguageModeling",
    "LogitsDistillation",
    "Objective",
    "PythonDocs",
    "SquareHead",
    "TextFile",
    "TokenDataModule",
    "byte_tokenizer",
    "corpus",
    "smollm2_135m",
    "tiny_checkpoint",
    "tiny_llama",
]
