"""Models and data for training and measuring: modules for text and images, token windows, corpora, ready models."""

from prune_callbacks.tasks.causal_lm import CausalLM
from prune_callbacks.tasks.corpora import HubText, PythonDocs, TextFile
from prune_callbacks.tasks.data import TokenDataModule
from prune_callbacks.tasks.digits import DigitsDataModule
from prune_callbacks.tasks.image_classifier import ImageClassifier, SmallResNet
from prune_callbacks.tasks.models import byte_tokenizer, smollm2_135m, tiny_checkpoint, tiny_llama
from prune_callbacks.tasks.named_corpora import corpus
from prune_callbacks.tasks.objectives import LanguageModeling, LogitsDistillation, Objective, SquareHead

__all__ = [
    "CausalLM",
    "DigitsDataModule",
    "HubText",
    "ImageClassifier",
    "LanguageModeling",
    "LogitsDistillation",
    "Objective",
    "PythonDocs",
    "SmallResNet",
    "SquareHead",
    "TextFile",
    "TokenDataModule",
    "byte_tokenizer",
    "corpus",
    "smollm2_135m",
    "tiny_checkpoint",
    "tiny_llama",
]
