"""Draws the calibration batches of callbacks."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from prune_callbacks.calibration.batches import Batch, accepted_inputs, named_inputs, warn_of_dropped_keys
from prune_callbacks.calibration.written import write_windows
from prune_callbacks.callbacks.lightning_internals import before_setup_of, training_data_source
from prune_callbacks.engine.sharing import share_weights
from prune_callbacks.ranks import Ranks

TRAINING_BATCHES = 128

EARLY = ("train_dataloader", "name the calibration batches with batches=")
"""What the sentence on training data that is made too late says of it."""


def calibration_batches(
    trainer: Trainer, ranks: Ranks, model: nn.Module | None, batches: Iterable[Any] | None, num_batches: int | None
) -> list[Batch]:
    """
    Returns this rank's share of the calibration batches, as inputs for the model; a collective of the ranks.

    Rank r of R gets every R-th of the batches that `drawn_batches` returns, beginning with batch r.
    """
    return drawn_batches(trainer, ranks, model, batches, num_batches)[ranks.rank :: ranks.size]


def drawn_batches(
    trainer: Trainer, ranks: Ranks, model: nn.Module | None, batches: Iterable[Any] | None, num_batches: int | None
) -> list[Batch]:
    """
    Returns the calibration batches, as inputs for the model, on every rank; a collective of the ranks.

    Rank 0 draws them. The random state is restored afterwards, so training draws the same numbers as without
    calibration.

    Args:
        trainer: the trainer, for its data module and training data if `batches` is None.
        ranks: the processes that get the batches.
        model: the model, which gets of a batch what its forward accepts; a warning names the rest once. None: batches
            are what a module's own step takes, of any kind.
        batches: token ids (batch, tokens), or mappings of the arguments of the model's forward. None: the data module's
            `calibration_dataloader()`, else the training data.
        num_batches: how many batches to draw; None: all, or the first 128 of the training data.

    Raises:
        ValueError: `num_batches` is below 1, there are fewer batches, a batch has values without names, `batches` is
            one batch, or the training data comes from several loaders, gives its batches once, or is made in the
            module's own `setup`, which runs later.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    with isolate_rng():
        drawn = ranks.attempt(lambda: _drawn(trainer, model, batches, num_batches) if ranks.rank == 0 else None)
    shared = ranks.share(drawn)
    assert shared is not None
    return shared


def check_counts(num_batches: int | None, written: int, *, calibrated: bool, own: bool) -> None:
    """
    Raises ValueError if `OneShotPrune` is asked for fewer than one batch, or for windows that nothing would use.

    Args:
        num_batches: how many batches to draw; None: all.
        written: how many windows the model is to write.
        calibrated: whether there are calibration batches at all.
        own: whether a function of the user's own runs these batches.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"OneShotPrune: num_batches must be at least 1, got {num_batches}")
    if not isinstance(written, int) or written < 0:
        raise ValueError(f"OneShotPrune: written_windows must be a whole number, got {written!r}")
    if written and (own or not calibrated):
        why = "forward= runs batches of its own kind" if own else "there is nothing to calibrate"
        raise ValueError(f"OneShotPrune: written_windows={written}, but {why}: leave written_windows out")


def with_written(
    batches: list[Batch] | None, model: nn.Module, count: int, ranks: Ranks, device: torch.device, progress: bool
) -> tuple[list[Batch], float]:
    """
    Adds this rank's share of `count` windows that the model writes itself; returns also the seconds that it took.

    They come in batches of as many windows as the first given batch. The rest is as in `write_windows`. A collective of
    the ranks.
    """
    begin, given = time.perf_counter(), batches or []
    share_weights(model, ranks)
    written = write_windows(model, given, count, device=device, progress=progress, ranks=ranks)
    rows = ranks.first(lambda: len(accepted_inputs(model, given[0])["input_ids"]))
    return [*given, *written.split(rows)[ranks.rank :: ranks.size]], time.perf_counter() - begin


def _drawn(trainer: Trainer, model: nn.Module | None, batches: Iterable[Any] | None, wanted: int | None) -> list[Batch]:
    """Draws the batches on this process, without changing the state of a loader's own generators."""
    if batches is None:
        calibration = getattr(trainer.datamodule, "calibration_dataloader", None)
        batches = calibration() if calibration is not None else None
    if batches is None:
        taken = _training_batches(trainer, wanted or TRAINING_BATCHES)
    else:
        taken = _first(_one_loader(batches), wanted)
    if wanted is not None and len(taken) < wanted:
        raise ValueError(f"asked for {wanted} calibration batches, there are {len(taken)}")
    if model is None:
        return taken
    named = [named_inputs(batch) for batch in taken]
    warn_of_dropped_keys(model, named)
    # Only what the model takes, since all ranks get a copy.
    kept = [accepted_inputs(model, batch) if isinstance(batch, Mapping) else batch for batch in named]
    return [new if isinstance(new, Tensor) or new else old for new, old in zip(kept, named, strict=True)]


def _training_batches(trainer: Trainer, wanted: int) -> list[Any]:
    """Returns batches of the training data: of the data module, the module or `fit(train_dataloaders=)`."""
    source: LightningDataModule | LightningModule | None = training_data_source(trainer)
    make = trainer.fit_loop._data_source.dataloader
    with before_setup_of(source, *EARLY):
        given = make()
    loader = _one_loader(given)
    if isinstance(loader, Iterator) and make() is given:
        raise ValueError(
            f"the training data is a {type(loader).__name__}, which gives every batch once, so training would not get "
            "those drawn for calibration: train on a loader, or name the calibration batches with batches="
        )
    with before_setup_of(source, *EARLY):
        taken = _first(loader, wanted)
        if not taken:
            raise ValueError("there is no calibration batch in the training data")
    return taken


def _first(loader: Iterable[Any], count: int | None) -> list[Any]:
    """Returns the first batches of a loader, which draws the same ones again afterwards."""
    with same_draws(loader):
        return list(islice(loader, count))


@contextmanager
def same_draws(loader: Any) -> Iterator[None]:
    """Restores the generators of a loader: it may shuffle by some of its own, which `isolate_rng` does not restore."""
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(loader: Any) -> Iterator[Generator]:
    """Yields the generators of a loader, of its samplers, and of the samplers inside of these."""
    generator = getattr(loader, "generator", None)
    if isinstance(generator, Generator):
        yield generator
    for inner in ("sampler", "batch_sampler"):
        if getattr(loader, inner, None) is not None:
            yield from _generators(getattr(loader, inner))


def _one_loader(loaders: Any) -> Iterable[Any]:
    """Returns the only loader; raises ValueError for several, or for one batch in place of several."""
    several = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    if isinstance(several, Tensor) and several.ndim < 3:
        raise ValueError(
            f"batches must be several batches, got one tensor of shape {tuple(several.shape)}: split it, or put it "
            "into a list"
        )
    if isinstance(several, Mapping):
        if "input_ids" in several or any(isinstance(part, Tensor) for part in several.values()):
            raise ValueError(
                f"batches must be several batches, got one mapping of {', '.join(map(repr, several))}: put it into a "
                "list"
            )
        found = ", ".join(map(repr, several))
    elif isinstance(several, list | tuple) and any(isinstance(part, DataLoader) for part in several):
        if len(several) == 1:
            return several[0]  # type: ignore[no-any-return]
        found = f"{len(several)} in a {type(several).__name__}"
    else:
        return several  # type: ignore[no-any-return]
    raise ValueError(
        f"the data comes from several loaders ({found}): name those that give the calibration "
        "batches with batches=, e.g. one of these loaders"
    )
