"""The functions that `recipe=prune_streaming` calls."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from prune_callbacks.engine.plan import parsed_device
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import needs_calibration
from prune_callbacks.ranks import launched_ranks
from prune_callbacks.reconstruction.settings import BlockReconstruction
from prune_callbacks.streaming.prune import prune_checkpoint
from prune_callbacks.streaming.source import CheckpointFolder


@runtime_checkable
class Calibration(Protocol):
    """The part of a data module, such as `TokenDataModule`, that streaming needs."""

    calibration_windows: Tensor | None
    calibration_batch_size: int

    def setup(self, stage: str) -> None: ...


def checked_source(source: str) -> str:
    """Returns `source`; raises ValueError, before the tokenizer is loaded, if the checkpoint cannot be read."""
    CheckpointFolder(source)
    return source


def prune_on_windows(
    source: str | Path,
    dirpath: str | Path,
    pruner: Pruner,
    data: Calibration,
    *,
    targets: Sequence[str] | str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    blocks: str | None = None,
    reconstruction: BlockReconstruction | None = None,
    min_expert_tokens: int = 32,
    name: str | None = None,
    whole_model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Runs `prune_checkpoint` on the calibration windows of a data module, writes the page and prints a summary line.

    Under torchrun all processes call it and share the work; each takes a GPU of its own with `device="cuda"`.

    Args:
        source: the folder of the checkpoint.
        dirpath: the folder to write into.
        pruner: the pruner for all layers.
        data: a data module with calibration windows, token ids (windows, tokens).
        targets: patterns of layer names; None for all.
        device: the device on which blocks are run and pruned.
        dtype: dtype of the weights; None: that of the configuration.
        blocks: name of the list of decoder blocks, where it cannot be found.
        reconstruction: trains every block after it is pruned; None: blocks stay as the pruner leaves them.
        min_expert_tokens: as in `prune_sequentially`.
        name: name of the recipe, for the report.
        whole_model: settings that need the whole model in memory, by name; all values must be empty.

    Returns:
        the content of `report.json`.

    Raises:
        ValueError: a setting in `whole_model` has a value, or as in `prune_checkpoint`.
    """
    # Imported here: matplotlib needs memory that users of `prune_checkpoint` alone want to save.
    from prune_callbacks.reporting.page import write_page
    from prune_callbacks.storage.commands import repeat_command

    given = [key for key, value in (whole_model or {}).items() if value]
    if given:
        raise ValueError(
            f"{' and '.join(given)} need the whole model, and {name} has one block of it in memory at a time. Leave "
            "them out. If the whole model fits in memory, prune it with another recipe, or measure the written model/ "
            "separately (prune_callbacks.measure.perplexity)"
        )
    batches = None
    if needs_calibration(pruner) or reconstruction is not None:
        data.setup("fit")
        assert data.calibration_windows is not None
        batches = data.calibration_windows.split(data.calibration_batch_size)
    where = _own_device(device)
    with launched_ranks(where) as ranks:
        report = prune_checkpoint(
            source,
            dirpath,
            pruner,
            batches,
            targets=targets,
            blocks=blocks,
            reconstruction=reconstruction,
            min_expert_tokens=min_expert_tokens,
            device=where,
            dtype=dtype,
            name=name,
            command=repeat_command(sys.argv),
            ranks=ranks,
        )
        if ranks.rank > 0:
            return report
    write_page(Path(dirpath))
    sparsity, seconds, peak = report["sparsity"], report["seconds"]["prune"], report["peak_memory_bytes"]
    print(
        f"{source}, pruned by {report['pruner']}, is in {Path(dirpath) / 'model'}: {sparsity['achieved']:.2%} zeros in "
        f"{len(sparsity['layers'])} layers, {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB"
    )
    return report


def _own_device(device: str | None) -> torch.device:
    """Returns the device of this process: of several on one machine, each has a GPU of its own."""
    where = parsed_device(device or "cpu")
    local = os.environ.get("LOCAL_RANK")
    if where.type != "cuda" or local is None:
        return where
    if where.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(f"device={device} is one GPU for all processes of a machine; device=cuda gives each its own")
    return where if where.index is not None else parsed_device(f"cuda:{local}")
