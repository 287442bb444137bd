"""Measures the quality of a model: perplexity and zero-shot accuracy."""

from prune_callbacks.measure.perplexity import Perplexity, perplexity
from prune_callbacks.measure.zero_shot import ZeroShot

__all__ = ["Perplexity", "ZeroShot", "perplexity"]
