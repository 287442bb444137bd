"""Writing a sparse model and its masks into a folder that every tool can read."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_callbacks.sparsity import MaskSet


def savable(model: nn.Module) -> PreTrainedModel:
    """The model itself, or ValueError: not of `transformers`, so without a common format."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"only transformers models can be saved, got {type(model).__name__}; save its state_dict instead"
        )
    return model


def save_sparse_model(
    model: nn.Module,
    masks: MaskSet,
    dirpath: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """
    Writes `dirpath/model` (plain `save_pretrained`, dense with zeros) and `dirpath/masks.safetensors`.

    Of a model with adapters (peft) it is the base that is written, under its own names. What was there is replaced only
    once the new files are complete.

    Args:
        model: of `transformers`.
        masks: its masks.
        dirpath: the folder.
        tokenizer: saved beside the model.
        state_dict: the model's, where it does not hold whole weights itself; None: its own.

    Raises:
        ValueError: the model cannot be saved; see `savable`.
    """
    model = savable(model)
    folder = Path(dirpath)
    with replacing(folder / "model") as partial:
        model.save_pretrained(
            partial, state_dict=_base_state_dict(model, model.state_dict() if state_dict is None else state_dict)
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        masks.save(folder / "masks.partial")
    (folder / "masks.partial").replace(folder / "masks.safetensors")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place once what is inside of the `with` is done."""
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)  # an earlier call was interrupted between its two renames
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _base_state_dict(model: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the model as it is without adapters: peft wraps a layer and keeps it as `base_layer`."""
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    adapters = [f"{name}." for name in wrapped]
    state: dict[str, Tensor] = {}
    for key, value in whole.items():
        wrapper = next((prefix for prefix in adapters if key.startswith(prefix)), None)
        if wrapper is None:
            state[key] = value
        elif key.startswith(f"{wrapper}base_layer."):
            state[wrapper + key.removeprefix(f"{wrapper}base_layer.")] = value
    return state
