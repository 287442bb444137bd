"""Draws the calibration batches of callbacks."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from prune_callbacks.ranks import Ranks

TRAINING_BATCHES = 128


def calibration_batches(
    trainer: Trainer, ranks: Ranks, batches: Iterable[Any] | None, num_batches: int | None
) -> list[Any]:
    """
    Returns this rank's share of the calibration batches, as inputs for the model; a collective of the ranks.

    Rank 0 draws the batches for all ranks; rank r of R gets every R-th batch, beginning with batch r. The random state
    is restored afterwards, so training draws the same numbers as without calibration.

    Args:
        trainer: the trainer, for its data module and training data if `batches` is None.
        ranks: the processes that share the batches.
        batches: token ids (batch, tokens), or mappings with `input_ids` and maybe `attention_mask`. None: the data
            module's `calibration_dataloader()`, else the training data.
        num_batches: how many batches to draw; None: all, or the first 128 of the training data.

    Raises:
        ValueError: `num_batches` is below 1, there are fewer batches, or a batch has no token ids.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    with isolate_rng():
        drawn = ranks.attempt(lambda: _drawn(trainer, batches, num_batches) if ranks.rank == 0 else None)
    shared = ranks.share(drawn)
    assert shared is not None
    return shared[ranks.rank :: ranks.size]


def _drawn(trainer: Trainer, batches: Iterable[Any] | None, wanted: int | None) -> list[Any]:
    """Draws the batches on this process, without changing the state of a loader's own generator."""
    if batches is None:
        calibration = getattr(trainer.datamodule, "calibration_dataloader", None)
        batches = calibration() if calibration is not None else None
    if batches is None:
        batches = trainer.fit_loop._data_source.dataloader()  # datamodule, module or fit(train_dataloaders=)
        # A loader may shuffle by its own generator, which isolate_rng does not restore.
        generator = getattr(batches, "generator", None)
        state = None if generator is None else generator.get_state()
        taken = list(islice(batches, wanted or TRAINING_BATCHES))
        if generator is not None:
            generator.set_state(state)
    else:
        taken = list(islice(batches, wanted))
    if wanted is not None and len(taken) < wanted:
        raise ValueError(f"asked for {wanted} calibration batches, there are {len(taken)}")
    return [_token_inputs(batch) for batch in taken]


def _token_inputs(batch: Any) -> Any:
    """Returns the inputs of the model in a batch; raises ValueError if it has no token ids."""
    if isinstance(batch, Mapping):  # transformers' BatchEncoding is a Mapping, but no dict
        return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    if isinstance(batch, Tensor):
        return batch
    raise ValueError(
        f"a calibration batch must be token ids, a mapping with input_ids, or a tuple that begins with "
        f"token ids; got {type(batch).__name__}"
    )
