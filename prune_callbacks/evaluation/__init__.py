"""How good a model is: perplexity, the run's report and its picture."""

from prune_callbacks.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
