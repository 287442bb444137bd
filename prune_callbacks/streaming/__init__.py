"""Pruning a checkpoint that does not fit into memory, one decoder block at a time."""

from prune_callbacks.streaming.job import checked_source, prune_on_windows
from prune_callbacks.streaming.perplexity import checkpoint_perplexity
from prune_callbacks.streaming.prune import prune_checkpoint

__all__ = ["checked_source", "checkpoint_perplexity", "prune_checkpoint", "prune_on_windows"]
