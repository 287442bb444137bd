"""prune_checkpoint: what prune_sequentially does, on a checkpoint that is read one decoder block at a time."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_callbacks.calibration.capture import Batch
from prune_callbacks.engine.plan import make_plan
from prune_callbacks.pruners import Pruner, check_pruner
from prune_callbacks.pruners.questions import coupled, needs_calibration
from prune_callbacks.recorded_warnings import RecordedWarnings
from prune_callbacks.streaming.finishing import check_space, finish
from prune_callbacks.streaming.inputs import described_batches
from prune_callbacks.streaming.journal import Journal, alone
from prune_callbacks.streaming.memory import returning_memory
from prune_callbacks.streaming.skeleton import build_skeleton, model_dtype
from prune_callbacks.streaming.source import CheckpointFolder
from prune_callbacks.streaming.walk import BlockWalk


@torch.no_grad()
def prune_checkpoint(
    source: str | Path,
    target: str | Path,
    pruner: Pruner,
    batches: Iterable[Batch] | None = None,
    *,
    device: torch.device | str | None = None,
    targets: Sequence[str] | str | None = None,
    blocks: str | None = None,
    min_expert_tokens: int = 32,
    dtype: torch.dtype | str | None = None,
    name: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Prunes a checkpoint one decoder block at a time, from files into files.

    Equivalent to `from_pretrained`, `prune_sequentially` and `save_pretrained`, bit for bit on one machine, in the
    memory of at most two blocks, their statistics and the embeddings. Writes `target/model` (a Hugging Face folder with
    one file of weights per block), `target/masks.safetensors` and `target/report.json`, for pruners that round also
    `target/scales.safetensors`. Called again after it was killed, it goes on at the first block that was not finished,
    and the model and its masks end byte for byte the same; called again after its end, it returns the report.

    Args:
        source: a Hugging Face folder with safetensors files; nothing in it is changed.
        target: a folder to write into.
        pruner: decides what goes and what becomes of the rest; all but `Structured`.
        batches: as of `prune_sequentially`, and the same ones when it goes on. May be None for a pruner that needs no
            calibration.
        device: where blocks are run and solved, one at a time; None: the CPU.
        targets: patterns of layer names; None as in `prune_sequentially`.
        blocks: name of the list of decoder blocks, where it cannot be found.
        min_expert_tokens: as in `prune_sequentially`.
        dtype: of the weights, as in `from_pretrained`; None: that of the configuration.
        name: of the recipe, for the report.
        command: that repeats this, for the report.
        progress: show a progress bar.

    Returns:
        what `report.json` holds.

    Raises:
        ValueError: before any work for a source that is damaged or cannot be read in parts, a target that is the source
            or was begun with another setting, too little disk space, targets or shapes that do not fit; on the way for
            a full disk and, naming the layer, for what the pruner cannot solve. What is finished is kept.

    While it runs, glibc's threshold for mapping memory is lowered for the whole process, and 32 MB afterwards, unless
    the environment sets MALLOC_MMAP_THRESHOLD_.
    """
    check_pruner("prune_checkpoint", pruner)
    source, target = Path(source), Path(target)
    _check_folders(source, target)
    if coupled(pruner):
        raise ValueError(
            f"{type(pruner).__name__} removes units from layers of all blocks at once, which takes the whole model: "
            "load it and use prune_sequentially"
        )
    with RecordedWarnings() as heard:
        given = _given_batches(pruner, batches)
        checkpoint = CheckpointFolder(source)
        model = build_skeleton(checkpoint.config, model_dtype(checkpoint, dtype))
        device = device or "cpu"
        plan = make_plan(
            "prune_checkpoint", model, pruner, given, targets=targets, blocks=blocks, device=device, unread=True
        )
        walk = BlockWalk(checkpoint, model, plan, given, min_expert_tokens)
        setting = {
            "source": checkpoint.fingerprint(),
            "pruner": repr(pruner),
            "targets": list(plan.targets),
            "min_expert_tokens": min_expert_tokens,
            "dtype": str(model.dtype),
            "device": walk.where.type,
            "batches": list(described_batches(given)),
        }
        with alone(target):
            journal = Journal(target, setting)
            if journal.report is None:
                journal.prepare()
                check_space(journal, walk.shards, given, model)
                with returning_memory():
                    walk.run(journal, progress, heard)
                about = {"recipe": name, "model": source.name, "command": command}
                finish(journal, walk, about | {"warnings": heard.texts})
            assert journal.report is not None
            journal.check_finished()
            return journal.report


def _given_batches(pruner: Pruner, batches: Iterable[Batch] | None) -> list[Batch]:
    """The calibration batches, of which a pruner that needs none gets none."""
    if isinstance(batches, Tensor):
        raise ValueError(f"batches must be several batches, got one tensor of shape {tuple(batches.shape)}; split it")
    if not needs_calibration(pruner):
        return []
    if batches is None:
        raise ValueError(f"{type(pruner).__name__} needs calibration batches, got None")
    given = list(batches)
    if not given:
        raise ValueError("there is no calibration batch; give at least one batch of token ids")
    return given


def _check_folders(source: Path, target: Path) -> None:
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise ValueError(
            f"target {target} is the source or inside of it ({source}), which stays as it is; choose another folder"
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"target {target} is a file; name a folder")
