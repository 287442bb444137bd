"""Writing a sparse model and its masks into a folder that every tool can read."""

import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_callbacks.sparsity import MaskSet


def savable(model: nn.Module) -> PreTrainedModel:
    """The model itself, or ValueError: not of `transformers`, so without a common format, or with adapters in it."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model has adapters injected (peft); a plain model folder cannot hold them. Merge them first"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"only transformers models can be saved, got {type(model).__name__}; save its state_dict instead"
        )
    return model


def save_sparse_model(
    model: nn.Module, masks: MaskSet, dirpath: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """
    Writes `dirpath/model` (plain `save_pretrained`, dense with zeros) and `dirpath/masks.safetensors`.

    What was there is replaced only once the new files are complete.

    Raises:
        ValueError: the model cannot be saved; see `savable`.
    """
    model = savable(model)
    folder = Path(dirpath)
    final, partial, old = folder / "model", folder / "model.partial", folder / "model.old"
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    masks.save(folder / "masks.partial")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    (folder / "masks.partial").replace(folder / "masks.safetensors")
    shutil.rmtree(old, ignore_errors=True)
