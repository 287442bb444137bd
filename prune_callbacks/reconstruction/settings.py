"""BlockReconstruction: the settings of block reconstruction."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
"""Factors of the learning rate, by name: functions of the fraction of steps that are done."""


@dataclass(frozen=True)
class BlockReconstruction:
    """
    Trains the kept weights of every pruned block so that the block's outputs come close to those of the dense model.

    The inputs of a block are those of the model pruned and reconstructed so far; its target is the output of the same
    block in the dense model, so it also makes up for errors of the blocks before it. The loss is the squared distance
    of a token's output from its target, divided by the target's squared norm, on average over the tokens: without the
    division, a few tokens with enormous activations decide everything. Adam updates the kept weights, biases and norms;
    pruned weights stay zero. Some windows are held out: the parameters with the lowest loss on them, after whichever
    pass, are the result, and a block whose held-out loss would rise is put back as it was.

    Needs the memory of one block five times in float32 (its parameters, their best values, gradients, two moments), six
    times for a block in 16 bits, and of the hidden states of all windows twice. Routers of experts stay as they are.

    Sources: EBFT (Guo et al. 2024), Shin et al. (EMNLP 2024).

    Args:
        passes: how many times a block sees the windows that are not held out.
        learning_rate: Adam's learning rate, relative to the root mean square of the kept values of each parameter.
        schedule: how the learning rate falls over a block's steps: "linear" or "cosine" to zero, or "constant".
        batch_size: windows per step, counted over all ranks. Each rank computes the windows that it holds, and waits if
            a step has none of them.
        held_out: the share of the windows that is held out, in [0, 1), rounded up to whole windows. With 0 the loss on
            the windows of the training decides.
        trained: "all" parameters of a block, or only the pruned "weights".
        seed: of the order of the windows.

    Raises:
        ValueError: a value is out of its range.
    """

    passes: int = 4
    learning_rate: float = 0.01
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    batch_size: int = 1
    held_out: float = 0.125
    trained: Literal["all", "weights"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("passes", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"BlockReconstruction: {name} must be a whole number of at least {least}, got {value!r}"
                )
        for name in ("learning_rate", "held_out"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"BlockReconstruction: {name} must be a finite number, got {value!r}")
        if self.learning_rate <= 0:
            raise ValueError(f"BlockReconstruction: learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"BlockReconstruction: held_out is a share, in [0, 1), got {self.held_out}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"BlockReconstruction: schedule must be one of {list(SCHEDULES)}, got {self.schedule!r}")
        if self.trained not in ("all", "weights"):
            raise ValueError(f'BlockReconstruction: trained must be "all" or "weights", got {self.trained!r}')


def short(reconstruction: BlockReconstruction | None) -> BlockReconstruction | None:
    """Returns the settings for a trial run of one batch: one pass, with nothing held out."""
    return None if reconstruction is None else replace(reconstruction, passes=1, held_out=0.0)


def check_reconstruction(who: str, reconstruction: object) -> None:
    """Raises ValueError, naming who asks, for something that is neither a `BlockReconstruction` nor None."""
    if reconstruction is not None and not isinstance(reconstruction, BlockReconstruction):
        raise ValueError(
            f"{who}: reconstruction must be a BlockReconstruction, got {reconstruction!r}; e.g. BlockReconstruction()"
        )
