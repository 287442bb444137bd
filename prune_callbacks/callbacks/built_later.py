"""Models that their module builds from a checkpoint when a fit begins, after the callbacks' `setup`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import PreTrainedModel

from prune_callbacks.anatomy.blocks import find_language_model
from prune_callbacks.callbacks.model_in_setup import model_in_setup
from prune_callbacks.streaming.skeleton import build_skeleton, model_dtype
from prune_callbacks.streaming.source import CheckpointFolder


@runtime_checkable
class BuiltFromFiles(Protocol):
    """
    A module that builds its model from a checkpoint in `configure_model`, such as `CausalLM(path=...)`.

    Attributes:
        dtype_of_path: dtype of the weights; None: that of the configuration.
    """

    dtype_of_path: torch.dtype | str | None

    def unbuilt(self) -> Path | None:
        """Returns the folder that the model will be built from; None if there is a model already, or no folder."""

    def build_from(self, folder: str | Path) -> None:
        """Makes `configure_model` build the model from another folder, in place of one that it may have built."""


def files_of(pl_module: LightningModule) -> Path | None:
    """Returns the folder that a module will build its model from; None if the model is there, as it mostly is."""
    return pl_module.unbuilt() if isinstance(pl_module, BuiltFromFiles) else None


def skeleton_of(pl_module: LightningModule, folder: Path) -> PreTrainedModel:
    """Returns the model of a folder, without values (on the meta device), in the dtype that the module asks for."""
    assert isinstance(pl_module, BuiltFromFiles)
    checkpoint = CheckpointFolder(folder)
    return build_skeleton(checkpoint.config, model_dtype(checkpoint, pl_module.dtype_of_path))


def shapes_of(pl_module: LightningModule) -> nn.Module:
    """Returns the language model of a module; of one that is built later, its `skeleton_of`."""
    folder = files_of(pl_module)
    return find_language_model(pl_module) if folder is None else skeleton_of(pl_module, folder)


def shapes_in_setup(who: str, pl_module: LightningModule, blocks: str | Sequence[str] | None = None) -> nn.Module:
    """Returns the model of a module, as `model_in_setup` does; of one that is built later, its `skeleton_of`."""
    folder = files_of(pl_module)
    return model_in_setup(who, pl_module, blocks) if folder is None else skeleton_of(pl_module, folder)
