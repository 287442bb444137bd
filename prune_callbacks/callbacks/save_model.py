"""Writes the model of a fit, sharded or not, into the folder of a run."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_callbacks.anatomy.blocks import NoBlocksError, find_blocks
from prune_callbacks.parallel.shapes import whole_shape
from prune_callbacks.parallel.strategies import gathered, gathered_state_dict, sharded, world
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.model_folder import MASKS, check_savable, save_sparse_model, write_beside
from prune_callbacks.storage.model_parts import INDEX, file_names, index_of, parts_of, write_part
from prune_callbacks.writing import replaced_folder, write_json

Save = Callable[[Trainer, nn.Module, MaskSet, Path, PreTrainedTokenizerBase | None], None]


def save_model(
    trainer: Trainer, model: nn.Module, masks: MaskSet, dirpath: Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """
    Writes model and masks into a run's folder, on rank 0; a collective, in which all processes fail if one fails.

    Of a sharded model of transformers every decoder block becomes a file, and one block is gathered at a time.
    """
    if sharded(trainer.strategy) and isinstance(model, PreTrainedModel):
        _save_parts(trainer, model, masks, dirpath, tokenizer)
        return
    state = gathered_state_dict(trainer, model)
    world(trainer).first(lambda: save_sparse_model(model, masks, dirpath, tokenizer, state))


def save_unless_there(
    trainer: Trainer, model: nn.Module, masks: MaskSet, dirpath: Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """As `save_model`; where the folder has masks already, the tokenizer alone is added to the model there."""
    if not world(trainer).share((dirpath / MASKS).exists()):
        save_model(trainer, model, masks, dirpath, tokenizer)
    elif tokenizer is not None and trainer.is_global_zero:
        tokenizer.save_pretrained(dirpath / "model")


def _save_parts(
    trainer: Trainer, model: PreTrainedModel, masks: MaskSet, dirpath: Path, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    tensors = model.state_dict(keep_vars=True)
    sizes = {name: whole_shape(value).numel() * value.element_size() for name, value in tensors.items()}
    parts = parts_of(sizes, _blocks(model))
    files = file_names(len(parts))
    ranks = world(trainer)
    with ExitStack() as stack:
        ranks.first(lambda: check_savable(model))
        folder = ranks.first(lambda: stack.enter_context(replaced_folder(dirpath / "model")))
        for file, names in zip(files, parts, strict=True):
            state = gathered(trainer, {name: tensors[name] for name in names}) or {}
            ranks.first(partial(write_part, model, state, folder / file))
        if len(files) > 1:
            ranks.first(lambda: write_json(folder / INDEX, index_of(folder, files)))
        ranks.first(lambda: write_beside(model, masks, folder, tokenizer))
        ranks.first(stack.close)  # renames the folder
    ranks.first(lambda: masks.save(dirpath / MASKS))


def _blocks(model: PreTrainedModel) -> list[str]:
    """Returns the names of the decoder blocks; none if they cannot be found."""
    try:
        return [name for name, _ in find_blocks(model)]
    except NoBlocksError:
        return []
