"""Trains the parameters of one block."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR

from prune_callbacks.parallel.plain import PlainAccess
from prune_callbacks.reconstruction.loss import BlockLoss
from prune_callbacks.reconstruction.parameters import Masters, only_trained
from prune_callbacks.reconstruction.settings import SCHEDULES, BlockReconstruction
from prune_callbacks.reconstruction.windows import count_held_out
from prune_callbacks.solvers.float64 import sum_in_float64
from prune_callbacks.sparsity import MaskSet

PATIENCE = 2
"""
A block ends after this many passes in a row without a lower held-out loss, but not in the first half of its passes:
the loss may rise at first, and fall as the learning rate does.
"""


class Trained(NamedTuple):
    """
    The result of training a block.

    Attributes:
        before: the loss on the held-out windows before training.
        after: the same loss after the best pass.
        best_pass: the number of the best pass, whose parameters the block has; 0 for one that is as it was before.
        tokens: how many tokens the training has seen, counted in every pass.
    """

    before: float
    after: float
    best_pass: int
    tokens: int


def train_block(
    block: nn.Module,
    loss: BlockLoss,
    parameters: Mapping[str, nn.Parameter],
    masks: MaskSet,
    settings: BlockReconstruction,
    seed: int,
    show: Callable[[int, float, float], None],
) -> Trained:
    """
    Trains a block's parameters in place, and keeps the best values that they had after a pass.

    If the held-out loss is no longer finite, the training ends with a warning.

    Args:
        block: the block.
        loss: its loss.
        parameters: the parameters to train, by their names in the block.
        masks: the masks of some of these parameters, by the same names.
        settings: the settings.
        seed: of the order of the windows.
        show: called after every pass with its number, the loss before the first pass, and the lowest loss so far.

    Raises:
        ValueError: the loss is not finite before training.
    """
    training, judged = _parted(loss.windows, settings)
    steps = settings.passes * math.ceil(len(training) / settings.batch_size)
    optimizer = _MaskedAdam(parameters, masks, settings, steps)
    order = torch.Generator().manual_seed(seed)
    before = lowest = loss.of(judged)
    if not math.isfinite(before):
        raise ValueError("the outputs of the pruned block, or of the dense one, are not finite")
    best, values = 0, optimizer.masters.copies()
    with only_trained(block, parameters):
        for number in range(1, settings.passes + 1):
            for places in torch.randperm(len(training), generator=order).split(settings.batch_size):
                chosen = [training[place] for place in places.tolist()]
                optimizer.step(loss.gradients(chosen, parameters, optimizer.scaler))
            now = loss.of(judged)
            if now < lowest:
                lowest, best, values = now, number, optimizer.masters.copies()
            show(number, before, lowest)
            if not math.isfinite(now):
                warnings.warn(
                    f"the loss is {now} after pass {number} of {settings.passes}, so the training ends there. A lower "
                    f"learning_rate than {settings.learning_rate} may keep it finite",
                    stacklevel=3,
                )
                break
            if number - best >= PATIENCE and 2 * number >= settings.passes:
                break
    optimizer.masters.restore(values)
    return Trained(before, lowest, best, number * loss.tokens(training))


class _MaskedAdam:
    """Adam on float32 masters of the parameters, whose pruned weights stay zero; the learning rate is relative."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: MaskSet, settings: BlockReconstruction, steps: int
    ) -> None:
        self.masters = Masters(parameters)
        self._optimizer = torch.optim.Adam(_by_scale(self.masters, settings.learning_rate))
        self._schedule = LambdaLR(self._optimizer, lambda step: SCHEDULES[settings.schedule](step / steps))
        self._access = PlainAccess(self.masters.holder, masks, [self._optimizer])
        half = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        # Without scaling, gradients in float16 would underflow to zero.
        self.scaler = GradScaler(next(iter(parameters.values())).device.type, enabled=half)

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Makes a step by gradients that `scaler` has scaled, and rounds the result into the parameters."""
        self.masters.take_gradients(gradients)
        self.scaler.unscale_(self._optimizer)
        self._access.mask_gradients()
        scale = self.scaler.get_scale()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # otherwise the step was skipped
            self._access.after_step(self._optimizer)
            self._schedule.step()
        self._optimizer.zero_grad()
        self.masters.write()


def _parted(count: int, settings: BlockReconstruction) -> tuple[range, range]:
    """Returns the places of the windows to train on, and of those that decide: the same ones if none are held out."""
    training = range(count - count_held_out(settings, count))
    return training, range(len(training), count) or training


def _by_scale(masters: Masters, rate: float) -> list[dict[str, object]]:
    """
    Returns the optimizer's groups: each parameter with a learning rate relative to the scale of its kept values.

    A parameter of zeros, such as a new bias, takes the scale of all matrices together.
    """
    named = dict(masters.holder.named_parameters())
    scales = {name: _root_mean_square([value.detach()]) for name, value in named.items()}
    common = _root_mean_square([value.detach() for value in named.values() if value.ndim > 1])
    return [{"params": [value], "lr": rate * (scales[name] or common)} for name, value in named.items()]


def _root_mean_square(values: Sequence[Tensor]) -> float:
    """Returns the root mean square of the values that are not zero; 0 if all are."""
    count = sum(int(value.count_nonzero()) for value in values)
    squares = sum(float(sum_in_float64(value.square())) for value in values)
    return math.sqrt(squares / count) if count else 0.0
