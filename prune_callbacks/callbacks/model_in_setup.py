"""Finds the model of a module when a fit begins, before the module's own setup has run."""

from lightning.pytorch import LightningModule
from torch import nn

from prune_callbacks.anatomy.blocks import find_blocks, find_language_model
from prune_callbacks.callbacks.lightning_internals import makes_in_setup


def model_in_setup(who: str, pl_module: LightningModule, blocks: str | None = None) -> nn.Module:
    """
    Returns the language model of a module, of which the decoder blocks can be found.

    Args:
        who: class name of the callback that needs it, for messages.
        pl_module: the module.
        blocks: name of the list of decoder blocks, where it cannot be found.

    Raises:
        ValueError: there is no model with decoder blocks yet; says so where the module has a `setup` or
            `configure_model` of its own, which Lightning calls later.
    """
    try:
        model = find_language_model(pl_module)
        find_blocks(model, blocks)
    except ValueError as error:
        if not makes_in_setup(pl_module):
            raise
        raise ValueError(
            f"{who} needs the model when the fit begins: build it in __init__. Lightning calls the setup of callbacks "
            f"before that of {type(pl_module).__name__} and before configure_model. At this time: {error}"
        ) from error
    return model
