"""How good a model is: perplexity, zero-shot accuracy, the run's report and its picture."""

from prune_callbacks.evaluation.perplexity import Perplexity, perplexity
from prune_callbacks.evaluation.zero_shot import ZeroShot

__all__ = ["Perplexity", "ZeroShot", "perplexity"]
