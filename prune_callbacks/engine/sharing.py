"""What ranks must have in common before they share work."""

from torch import nn

from prune_callbacks.ranks import Ranks


def share_weights(model: nn.Module, ranks: Ranks) -> None:
    """Gives all ranks the weights of rank 0: each may have drawn them by another seed."""
    for parameter in model.parameters():
        ranks.broadcast(parameter.data, 0)
