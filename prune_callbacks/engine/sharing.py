"""Gives ranks equal weights before they share work."""

from torch import nn

from prune_callbacks.ranks import Ranks


def share_weights(model: nn.Module, ranks: Ranks) -> None:
    """Copies the weights of rank 0 to all ranks, which may have initialized theirs with other seeds; a collective."""
    for parameter in model.parameters():
        ranks.broadcast(parameter.data, 0)
