"""Names the matrices in decoder blocks that torch's own modules multiply with, and that are no targets."""

from collections.abc import Sequence

from torch import nn

MULTIPLYING = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
"""Modules of torch with matrices in parameters of their own, outside of any linear layer."""


def other_matrices(blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, str]:
    """Returns the reason for every such matrix why it stays dense, by the parameter's full name."""
    found: dict[str, str] = {}
    for block_name, block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, MULTIPLYING):
                kind = next(base.__name__ for base in type(module).__mro__ if base in MULTIPLYING)
                for own, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim > 1 and parameter.is_floating_point():
                        path = ".".join(filter(None, (block_name, name, own)))
                        found[path] = f"it is a parameter of a nn.{kind}, and of no linear layer"
    return found
