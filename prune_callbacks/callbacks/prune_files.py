"""Prunes, from files into files, a model that its module builds from a checkpoint when a fit begins."""

import shutil
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors.torch import load_file
from transformers import PreTrainedModel

from prune_callbacks.anatomy.stages import block_stages
from prune_callbacks.anatomy.targets import all_targets
from prune_callbacks.calibration.described import count_tokens
from prune_callbacks.callbacks.built_later import BuiltFromFiles, files_of, skeleton_of
from prune_callbacks.callbacks.calibration_batches import drawn_batches
from prune_callbacks.callbacks.one_shot_settings import OneShotSettings
from prune_callbacks.engine.report import LayerReport, PruneReport
from prune_callbacks.parallel.strategies import world
from prune_callbacks.ranks import patient_ranks
from prune_callbacks.reconstruction.report import BlockReport
from prune_callbacks.sparsity import MaskSet
from prune_callbacks.storage.model_folder import MASKS
from prune_callbacks.storage.run_record import RunRecord
from prune_callbacks.streaming.journal import MODEL, SCALES
from prune_callbacks.streaming.prune import prune_checkpoint


def prune_files(
    trainer: Trainer, pl_module: LightningModule, source: Path, folder: Path, settings: OneShotSettings
) -> PruneReport:
    """
    Prunes the checkpoint of a module by `prune_checkpoint`, over all ranks; the module will build the pruned one.

    If the folder holds the pruned files already, or a part of them, they are used.

    Args:
        trainer: the trainer of the fit that begins.
        pl_module: a `BuiltFromFiles` whose model is not there yet.
        source: the folder that it would build the model from.
        folder: the target, the same on all ranks.
        settings: what to do.

    Raises:
        ValueError: as in `prune_checkpoint`, on every rank.
    """
    assert isinstance(pl_module, BuiltFromFiles)
    blocks = settings.blocks if isinstance(settings.blocks, str) else next(iter(settings.blocks or ()), None)
    dtype, device = pl_module.dtype_of_path, trainer.strategy.root_device
    with isolate_rng(), patient_ranks(device) as ranks:
        model = ranks.attempt(lambda: skeleton_of(pl_module, source))
        batches = None
        if settings.calibrated:
            batches = drawn_batches(trainer, ranks, model, settings.batches, settings.num_batches)
        record = prune_checkpoint(
            source,
            folder,
            settings.pruner,
            batches,
            device=device,
            targets=settings.targets,
            blocks=blocks,
            reconstruction=settings.reconstruction,
            min_expert_tokens=settings.min_expert_tokens,
            dtype=dtype,
            progress=settings.progress,
            ranks=ranks,
        )
    rank_zero_info(f"the pruned files of {source} are in {folder}")
    pl_module.build_from(folder / MODEL)
    return _report(RunRecord.from_json(record), folder, model, blocks, sum(map(count_tokens, batches or ())))


def back_to_source(pl_module: LightningModule) -> Callable[[], None]:
    """
    Returns a function that makes a module build its model from the source again, if a fit ends before it has built it.

    Else the next fit would take the pruned files for the dense model.
    """
    source = files_of(pl_module)
    assert source is not None
    assert isinstance(pl_module, BuiltFromFiles)

    def undo() -> None:
        if files_of(pl_module) is not None:
            pl_module.build_from(source)

    return undo


def begin_trial(trainer: Trainer, pl_module: LightningModule, folder: Path) -> Callable[[], None]:
    """
    Empties the folder of a trial run; a collective.

    Returns:
        a function that removes the folder, and makes the module build its model from the source in the next fit.
    """
    source = files_of(pl_module)
    assert source is not None
    assert isinstance(pl_module, BuiltFromFiles)
    world(trainer).first(lambda: shutil.rmtree(folder, ignore_errors=True))

    def undo() -> None:
        pl_module.build_from(source)
        if trainer.is_global_zero:  # not a collective: the fit may have failed on one rank
            shutil.rmtree(folder, ignore_errors=True)

    return undo


def refuse_whole(pl_module: LightningModule, settings: OneShotSettings) -> None:
    """Raises ValueError if a setting needs the whole model in memory."""
    whole = {
        "forward": settings.forward is not None,
        "allocation": settings.allocation is not None,
        "written_windows": settings.written_windows > 0,
        "order": settings.order != "sequential",
        "blocks": not isinstance(settings.blocks, str) and len(settings.blocks or ()) > 1,
    }
    named = [name for name, given in whole.items() if given]
    if named:
        raise ValueError(
            f"OneShotPrune({', '.join(f'{name}={getattr(settings, name)!r}' for name in named)}) needs the whole "
            f"model, and {type(pl_module).__name__} builds it later, so it is pruned from its files, with one block in "
            "memory at a time. Leave that out, or build the model in __init__"
        )


def _report(run: RunRecord, folder: Path, model: PreTrainedModel, blocks: str | None, tokens: int) -> PruneReport:
    """Makes the report of a pruning from the record in its files; the masks stay in the file until they are used."""
    masks, scales = MaskSet.load(folder / MASKS), folder / SCALES
    found = all_targets(block_stages(model, blocks).parts, every_kind=False).values()
    return PruneReport(
        masks=masks,
        layers=tuple(LayerReport(**layer | {"shape": tuple(layer["shape"])}) for layer in run.layers),
        skipped=run.skipped,
        seconds=run.seconds.prune or 0.0,
        peak_memory_bytes=run.peak_memory_bytes or 0,
        input_first=frozenset(t.parameter_name for t in found if t.input_first and t.parameter_name in masks),
        scales=load_file(scales) if scales.exists() else {},
        by_magnitude=run.by_magnitude,
        reconstruction=tuple(BlockReport(**block) for block in run.reconstruction.get("blocks", ())),
        untrained=run.reconstruction.get("untrained", {}),
        tokens=tokens,
    )
