"""Prunes the model of a module when a fit begins, in memory."""

from contextlib import ExitStack
from dataclasses import replace

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from transformers import PreTrainedModel

from prune_callbacks.callbacks.calibration_batches import calibration_batches, with_written
from prune_callbacks.callbacks.model_in_setup import layers_beside
from prune_callbacks.callbacks.one_shot_settings import OneShotSettings
from prune_callbacks.callbacks.own_step import own_step
from prune_callbacks.callbacks.untouched import untouched
from prune_callbacks.callbacks.validation_metrics import on_its_device
from prune_callbacks.engine.report import PruneReport
from prune_callbacks.engine.sequential import prune_sequentially
from prune_callbacks.ranks import patient_ranks
from prune_callbacks.storage.model_folder import save_sparse_model


def prune_module(
    trainer: Trainer, pl_module: LightningModule, model: nn.Module, settings: OneShotSettings
) -> PruneReport:
    """
    Prunes the model of a module by `prune_sequentially`, on the trainer's device and over all ranks.

    Leaves no other trace: random states, buffers and other attributes are as before.

    Args:
        trainer: the trainer of the fit that begins.
        pl_module: the module.
        model: its model, or the module itself.
        settings: what to do; with a `dirpath`, rank 0 saves the pruned model there.
    """
    needed, device = settings.calibrated, trainer.strategy.root_device
    own = needed and (settings.forward is not None or not isinstance(model, PreTrainedModel))
    with ExitStack() as stack:
        if own:  # all of the module runs
            stack.enter_context(on_its_device(trainer, pl_module))
        stack.enter_context(untouched(trainer, pl_module) if own else isolate_rng())
        ranks = stack.enter_context(patient_ranks(device))
        drawn = trainer, ranks, None if own else model, settings.batches, settings.num_batches
        batches = calibration_batches(*drawn) if needed else None
        writing = 0.0
        if settings.written_windows:
            more = settings.written_windows, ranks, device, settings.progress
            batches, writing = with_written(batches, model, *more)
        report = prune_sequentially(
            model,
            batches,
            settings.pruner,
            targets=settings.targets,
            blocks=settings.blocks,
            forward=own_step(pl_module, settings.forward) if own else None,
            order=settings.order,
            device=device,
            allocation=settings.allocation,
            reconstruction=settings.reconstruction,
            min_expert_tokens=settings.min_expert_tokens,
            progress=settings.progress,
            ranks=ranks,
        )
        dirpath = settings.dirpath
        if dirpath is not None:
            ranks.first(lambda: save_sparse_model(model, report.masks, dirpath))
    beside = layers_beside(pl_module, model) if settings.targets is None else {}
    return replace(report, writing_seconds=writing, skipped=report.skipped | beside)
