"""Finds the model of a module when a fit begins, before the module's own setup has run."""

from collections.abc import Collection, Sequence

from lightning.pytorch import LightningModule
from torch import nn

from prune_callbacks.anatomy.adapters import without_adapter
from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.anatomy.stages import find_stages, stage_targets
from prune_callbacks.anatomy.targets import all_targets
from prune_callbacks.callbacks.lightning_internals import makes_in_setup


def model_in_setup(who: str, pl_module: LightningModule, blocks: str | Sequence[str] | None = None) -> nn.Module:
    """
    Returns the model of a module, of which the stages can be found.

    Args:
        who: class name of the callback that needs it, for messages.
        pl_module: the module.
        blocks: the name of the list of blocks, or of several, where they cannot be found.

    Raises:
        ValueError: there is no model with layers. Says that it is too early for one where the module has no parameters,
            or no layer and a `setup` or `configure_model` of its own, which run later.
    """
    try:
        if next(pl_module.parameters(), None) is None:
            raise ValueError(f"{type(pl_module).__name__} has no parameters in setup")
        model = find_language_model(pl_module)
        stages = find_stages(model, blocks)
        if not _has_model(pl_module):
            stage_targets(model, stages)
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


def layer_names(pl_module: LightningModule, blocks: str | Sequence[str] | None) -> set[str]:
    """Returns the names of the weights of all layers that could be pruned."""
    model = find_language_model(pl_module)
    found = all_targets(find_stages(model, blocks).parts, every_kind=True)
    return {without_adapter(target.parameter_name) for target in found.values()}


def refuse_later_layers(
    who: str, pl_module: LightningModule, blocks: str | Sequence[str] | None, before: Collection[str]
) -> None:
    """
    Raises ValueError if a module has made layers after the callbacks' `setup`, which were not there to be pruned.

    Args:
        who: class name of the callback that pruned, for the message.
        pl_module: the module.
        blocks: the name of the list of blocks, or of several, as for `find_stages`.
        before: the `layer_names` in `setup`.
    """
    later = layer_names(pl_module, blocks) - set(before)
    if later:
        raise ValueError(
            f"{type(pl_module).__name__} has made {len(later)} layers after {who} has pruned, first {min(later)}: "
            "Lightning calls the setup of callbacks before that of the module and before configure_model. Build the "
            "model in __init__"
        )
