"""prune_checkpoint: prunes like prune_sequentially, but reads the checkpoint one decoder block at a time."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_callbacks.anatomy.stages import block_stages
from prune_callbacks.calibration.batches import Batch, named_inputs
from prune_callbacks.calibration.checks import check_batches
from prune_callbacks.calibration.described import described
from prune_callbacks.engine.fitting import check_reconstructible
from prune_callbacks.engine.plan import make_plan
from prune_callbacks.pruners import Pruner, check_pruner
from prune_callbacks.pruners.questions import coupled, needs_calibration
from prune_callbacks.ranks import ALONE, Ranks
from prune_callbacks.reconstruction.settings import BlockReconstruction
from prune_callbacks.reconstruction.windows import single_windows
from prune_callbacks.recorded_warnings import RecordedWarnings
from prune_callbacks.streaming.finishing import check_space, finish
from prune_callbacks.streaming.journal import Journal, difference
from prune_callbacks.streaming.memory import returning_memory
from prune_callbacks.streaming.skeleton import build_skeleton, model_dtype
from prune_callbacks.streaming.source import CheckpointFolder
from prune_callbacks.streaming.together import alone
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
    reconstruction: BlockReconstruction | None = None,
    min_expert_tokens: int = 32,
    dtype: torch.dtype | str | None = None,
    name: str | None = None,
    command: str | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """
    Prunes a checkpoint one decoder block at a time, from files into files.

    Equivalent to `from_pretrained`, `prune_sequentially` and `save_pretrained`, bit for bit on one machine, in the
    memory of at most two blocks, their statistics and the embeddings. Writes `target/model` (a Hugging Face folder with
    one file of weights per block), `target/masks.safetensors` and `target/report.json`; pruners that quantize also
    write `target/scales.safetensors`. After a kill, the same call resumes at the first unfinished block, and the final
    model and masks are the same byte for byte. After a finished pruning, the same call returns the report.

    Args:
        source: a Hugging Face folder with safetensors files; nothing in it is changed.
        target: a folder to write into.
        pruner: chooses the weights to remove and updates the rest; any pruner but `Structured`.
        batches: calibration batches, as in `prune_sequentially`; a call that resumes needs the same ones. May be None
            for a pruner that needs no calibration, without reconstruction.
        device: the device on which blocks are run and pruned, one at a time; None: the CPU.
        targets: patterns of layer names; None as in `prune_sequentially`.
        blocks: name of the list of decoder blocks, where it cannot be found.
        reconstruction: as in `prune_sequentially`; the hidden states of the dense model are kept in files too, and
            memory holds one block five times (six in 16 bits). On a GPU, whose backward passes need not repeat bit for
            bit, a resumed call may end with other roundings; torch.use_deterministic_algorithms(True) prevents that.
        min_expert_tokens: as in `prune_sequentially`.
        dtype: dtype of the weights, as in `from_pretrained`; None: that of the configuration.
        name: name of the recipe, for the report.
        command: command line that repeats this call, for the report.
        progress: show a progress bar.
        ranks: processes that share the work and the folders, all called with the same arguments and all batches: each
            runs every R-th of them, statistics are summed, layers are solved on different ranks. Equivalent to one
            process, to the rounding of the sums. A call that resumes may have another number of ranks, and then ends
            as one process would to that rounding, not byte for byte.

    Returns:
        the content of `report.json`.

    Raises:
        ValueError: before any work: the source is damaged or cannot be read in parts, the target is the source or was
            started with another setting, the disk has too little space, or targets or shapes do not fit. During the
            work: the disk is full, or the pruner cannot solve a layer, which the error names. Finished blocks are kept.

    Lowers glibc's threshold for mapping memory in the whole process while it runs, and leaves it at 32 MB, unless the
    environment sets MALLOC_MMAP_THRESHOLD_.
    """
    source, target = Path(source), Path(target)
    ranks.attempt(lambda: _check_arguments(source, target, pruner, reconstruction))
    with RecordedWarnings() as heard:

        def prepare() -> tuple[BlockWalk, list[Batch], dict[str, Any]]:
            given = _given_batches(pruner, reconstruction, batches)
            checkpoint = CheckpointFolder(source)
            model = build_skeleton(checkpoint.config, model_dtype(checkpoint, dtype))
            stages, where = block_stages(model, blocks), device or "cpu"
            settings: dict[str, Any] = {"targets": targets, "stages": stages, "reconstruction": reconstruction}
            plan = make_plan("prune_checkpoint", model, pruner, given, unread=True, device=where, **settings)
            check_batches(model, given)
            walk = BlockWalk(checkpoint, model, plan, given, min_expert_tokens, ranks)
            return walk, given, _setting(walk, given, min_expert_tokens)

        walk, given, setting = ranks.attempt(prepare)
        _check_same(ranks.gather(setting))
        with alone(target, ranks):
            journal = Journal(target, setting, ranks)
            if journal.report is None:
                journal.prepare()
                streams = 1 if reconstruction is None else 2
                ranks.first(lambda: check_space(journal, walk.shards, given, walk.model, streams=streams))
                with returning_memory():
                    walk.run(journal, progress, heard)
                texts = dict.fromkeys([*journal.records[-1]["warnings"], *heard.texts])
                about = {"recipe": name, "model": source.name, "command": command, "warnings": list(texts)}
                journal.report = ranks.first(lambda: finish(journal, walk, about))
            assert journal.report is not None
            journal.check_finished()
            return journal.report


def _check_arguments(source: Path, target: Path, pruner: Pruner, reconstruction: BlockReconstruction | None) -> None:
    """Raises ValueError for folders or a pruner that cannot be used."""
    check_pruner("prune_checkpoint", pruner)
    check_reconstructible("prune_checkpoint", reconstruction, pruner)
    _check_folders(source, target)
    if coupled(pruner):
        raise ValueError(
            f"{type(pruner).__name__} removes units from layers of all blocks at once and needs the whole model: "
            "load it and use prune_sequentially"
        )


def _check_same(settings: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, on every rank, if ranks were called with different arguments, or see other files."""
    for rank, setting in enumerate(settings):
        wrong = difference(settings[0], setting)
        if wrong:
            raise ValueError(f"prune_checkpoint was called on rank {rank} with another setting than on rank 0: {wrong}")


def _setting(walk: BlockWalk, batches: Sequence[Batch], min_expert_tokens: int) -> dict[str, Any]:
    """Returns all settings on which the result depends."""
    plan = walk.plan
    setting = {
        "source": walk.checkpoint.fingerprint(),
        "pruner": repr(plan.pruner),
        "targets": list(plan.targets),
        "min_expert_tokens": min_expert_tokens,
        "dtype": str(walk.model.dtype),
        "device": walk.where.type,
        "batches": [described(batch) for batch in batches],
    }
    return setting if plan.reconstruction is None else setting | {"reconstruction": repr(plan.reconstruction)}


def _given_batches(
    pruner: Pruner, reconstruction: BlockReconstruction | None, batches: Iterable[Batch] | None
) -> list[Batch]:
    """Returns the calibration batches, cut into single windows for reconstruction; no batches if none are needed."""
    if isinstance(batches, Tensor):
        raise ValueError(f"batches must be several batches, got one tensor of shape {tuple(batches.shape)}; split it")
    if not needs_calibration(pruner) and reconstruction is None:
        return []
    if batches is None:
        asking = pruner if needs_calibration(pruner) else reconstruction
        raise ValueError(f"{type(asking).__name__} needs calibration batches, got None")
    given = [named_inputs(batch) for batch in batches]
    if not given:
        raise ValueError("there is no calibration batch; give at least one batch of token ids")
    return given if reconstruction is None else single_windows(given, reconstruction, ALONE).mine


def _check_folders(source: Path, target: Path) -> None:
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise ValueError(
            f"target {target} is the source or inside of it ({source}), which is never changed; choose another folder"
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"target {target} is a file; name a folder")
