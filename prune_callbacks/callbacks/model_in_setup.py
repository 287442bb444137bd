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
        ValueError: there is no model with decoder blocks. Says that it is too early for one where the module has no
            parameters, or has no `nn.ModuleList` and a `setup` or `configure_model` of its own, which run later.
    """
    try:
        if next(pl_module.parameters(), None) is None:
            raise ValueError(f"{type(pl_module).__name__} has no parameters in setup")
        model = find_language_model(pl_module)
        find_blocks(model, blocks)
    except ValueError as error:
        if _has_model(pl_module):
            raise
        raise ValueError(
            f"{error}. {who} needs the model when the fit begins: build the model in __init__. Lightning calls the "
            f"setup of callbacks before that of {type(pl_module).__name__} and before configure_model"
        ) from error
    return model


def _has_model(pl_module: LightningModule) -> bool:
    """Returns whether a module has what could be a model, so that nothing is missing that is made later."""
    if next(pl_module.parameters(), None) is None:
        return False
    return not makes_in_setup(pl_module) or any(isinstance(m, nn.ModuleList) and len(m) for m in pl_module.modules())
