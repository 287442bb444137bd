"""Draws the calibration batches of callbacks."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader

from prune_callbacks.calibration.batches import Batch, accepted_inputs, named_inputs, warn_of_dropped_keys
from prune_callbacks.callbacks.lightning_internals import makes_in_setup, training_data_source
from prune_callbacks.ranks import Ranks

TRAINING_BATCHES = 128


def calibration_batches(
    trainer: Trainer, ranks: Ranks, model: nn.Module, batches: Iterable[Any] | None, num_batches: int | None
) -> list[Batch]:
    """
    Returns this rank's share of the calibration batches, as inputs for the model; a collective of the ranks.

    Rank 0 draws the batches for all ranks; rank r of R gets every R-th batch, beginning with batch r. The random state
    is restored afterwards, so training draws the same numbers as without calibration.

    Args:
        trainer: the trainer, for its data module and training data if `batches` is None.
        ranks: the processes that share the batches.
        model: the model, which gets of a batch what its forward accepts; a warning names the rest once.
        batches: token ids (batch, tokens), or mappings of the arguments of the model's forward. None: the data module's
            `calibration_dataloader()`, else the training data.
        num_batches: how many batches to draw; None: all, or the first 128 of the training data.

    Raises:
        ValueError: `num_batches` is below 1, there are fewer batches, a batch has values without names, or the training
            data comes from several loaders, or is made in the module's own `setup`, which runs later.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    with isolate_rng():
        drawn = ranks.attempt(lambda: _drawn(trainer, model, batches, num_batches) if ranks.rank == 0 else None)
    shared = ranks.share(drawn)
    assert shared is not None
    return shared[ranks.rank :: ranks.size]


def _drawn(trainer: Trainer, model: nn.Module, batches: Iterable[Any] | None, wanted: int | None) -> list[Batch]:
    """Draws the batches on this process, without changing the state of a loader's own generator."""
    if batches is None:
        calibration = getattr(trainer.datamodule, "calibration_dataloader", None)
        batches = calibration() if calibration is not None else None
    if batches is None:
        batches = _training_data(trainer)
        # A loader may shuffle by its own generator, which isolate_rng does not restore.
        generator = getattr(batches, "generator", None)
        state = None if generator is None else generator.get_state()
        taken = list(islice(batches, wanted or TRAINING_BATCHES))
        if generator is not None:
            generator.set_state(state)
    else:
        taken = list(islice(_one_loader(batches), wanted))
    if wanted is not None and len(taken) < wanted:
        raise ValueError(f"asked for {wanted} calibration batches, there are {len(taken)}")
    named = [named_inputs(batch) for batch in taken]
    warn_of_dropped_keys(model, named)
    # Only what the model takes, since all ranks get a copy.
    return [accepted_inputs(model, batch) if isinstance(batch, Mapping) else batch for batch in named]


def _training_data(trainer: Trainer) -> Iterable[Any]:
    """Returns the loader of the training data: of the data module, the module or `fit(train_dataloaders=)`."""
    source: LightningDataModule | LightningModule | None = training_data_source(trainer)
    try:
        return _one_loader(trainer.fit_loop._data_source.dataloader())
    except (AttributeError, LookupError, TypeError) as error:
        if source is None or not makes_in_setup(source):
            raise
        raise ValueError(
            f"train_dataloader of {type(source).__name__} failed ({type(error).__name__}: {error}). Its own setup() "
            "has not run yet: Lightning calls that of the callbacks first. Make the data in __init__ or prepare_data, "
            "or in a LightningDataModule, whose setup comes earlier, or name the calibration batches with batches="
        ) from error


def _one_loader(loaders: Any) -> Iterable[Any]:
    """Returns a loader as it is; raises ValueError for several."""
    several = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    if isinstance(several, Mapping):
        found = ", ".join(map(repr, several))
    elif isinstance(several, list | tuple) and any(isinstance(part, DataLoader) for part in several):
        found = f"{len(several)} in a {type(several).__name__}"
    else:
        return loaders  # type: ignore[no-any-return]
    raise ValueError(
        f"the data comes from several loaders ({found}), whose batches are of different kinds: name the calibration "
        "batches with batches=, e.g. one of these loaders"
    )
