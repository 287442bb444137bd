"""Trains the parameters of one block on the distance of its outputs from those of the dense model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR

from prune_callbacks.calibration.capture import block_output, hidden_of
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.parallel.plain import PlainAccess
from prune_callbacks.ranks import Ranks
from prune_callbacks.reconstruction.parameters import Masters, only_trained
from prune_callbacks.reconstruction.settings import SCHEDULES, BlockReconstruction
from prune_callbacks.reconstruction.windows import held_back
from prune_callbacks.sparsity import MaskSet

FLOOR = 1e-4
"""The smallest squared norm of a target that an error is divided by, relative to the mean over all tokens."""

PATIENCE = 2
"""
A block ends after this many passes in a row without a lower held-out loss, but not in the first half of its passes:
the loss may rise at first, and fall as the learning rate does.
"""


class BlockLoss:
    """
    The mean relative error of a block's outputs: ||output - target||^2 / ||target||^2, over the real tokens.

    A vector along the last dimension is a token. The windows of all ranks count; each computes its own.

    Args:
        index: the index of the block.
        block: the block.
        inputs: the inputs of the block, one window each.
        goals: the same windows, with the target in place of the hidden states.
        order: the owners of all windows; see `Windows`.
        where: the device of the block.
        ranks: the processes.
    """

    def __init__(
        self,
        index: int,
        block: nn.Module,
        inputs: Sequence[BlockInputs],
        goals: Sequence[BlockInputs],
        order: Sequence[tuple[int, int]],
        where: torch.device,
        ranks: Ranks,
    ) -> None:
        self._index, self._block, self._inputs, self._goals = index, block, inputs, goals
        self._order, self._where, self._ranks = order, where, ranks
        every = ranks.gather(ranks.attempt(lambda: [self._size(goal) for goal in goals]))
        sizes = [every[rank][number] for rank, number in order]
        self._counts = [count for _, count in sizes]
        self._floor = FLOOR * sum(norms for norms, _ in sizes) / max(1, sum(self._counts))

    def _size(self, goal: BlockInputs) -> tuple[float, int]:
        """Returns the summed squared norm of a window's targets, and the number of its real tokens."""
        norms = self._real(goal, goal.hidden.double().square().sum(-1))
        return float(norms.sum()), norms.numel()

    @staticmethod
    def _real(window: BlockInputs, values: Tensor) -> Tensor:
        """Returns the values of real tokens."""
        tokens = window.tokens
        return values if tokens is None or tokens.shape != values.shape else values[tokens.to(values.device)]

    def _error(self, number: int) -> Tensor:
        """Returns the summed error over a window of this rank."""
        output = hidden_of(block_output(self._index, self._block, self._inputs[number], self._where))
        goal = self._goals[number].hidden.to(self._where)
        wide = torch.promote_types(goal.dtype, torch.float32)
        squares = (output.to(wide) - goal.to(wide)).square().sum(-1)
        norms = goal.to(wide).square().sum(-1).clamp(min=self._floor)
        return self._real(self._goals[number], squares / norms).sum()

    def _mine(self, places: Sequence[int]) -> list[int]:
        """Returns the numbers of this rank's windows at places of the order."""
        return [number for rank, number in (self._order[place] for place in places) if rank == self._ranks.rank]

    def tokens(self, places: Sequence[int]) -> int:
        """Returns the number of real tokens in the windows at places of the order, at least 1."""
        return max(1, sum(self._counts[place] for place in places))

    @torch.no_grad()
    def of(self, places: Sequence[int]) -> float:
        """Returns the loss on the windows at places of the order; a collective of the ranks."""
        total = self._ranks.attempt(lambda: sum(float(self._error(number)) for number in self._mine(places)))
        return sum(self._ranks.gather(total)) / self.tokens(places)

    def gradients(
        self, places: Sequence[int], parameters: Mapping[str, nn.Parameter], scaler: GradScaler
    ) -> dict[str, Tensor]:
        """Returns the scaled gradients of the loss on windows, by the parameters' names; a collective of the ranks."""
        tensors = list(parameters.values())

        def mine() -> Sequence[Tensor]:
            total: Sequence[Tensor] = []
            for number in self._mine(places):
                with torch.enable_grad():
                    loss = scaler.scale(self._error(number) / self.tokens(places))
                found = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
                total = [one.add_(other) for one, other in zip(total, found, strict=True)] if total else found
            return total or [torch.zeros_like(parameter) for parameter in tensors]

        found = self._ranks.attempt(mine)
        return {name: self._ranks.sum(gradient) for name, gradient in zip(parameters, found, strict=True)}


class Trained(NamedTuple):
    """
    The result of training a block.

    Attributes:
        before: the loss on the held-out windows before training.
        after: the same loss after the best pass.
        passes: the number of the best pass, whose parameters the block has; 0 for one that is as it was before.
        tokens: how many tokens the training has seen, counted in every pass.
    """

    before: float
    after: float
    passes: int
    tokens: int


def train_block(
    block: nn.Module,
    loss: BlockLoss,
    parameters: Mapping[str, nn.Parameter],
    masks: MaskSet,
    settings: BlockReconstruction,
    count: int,
    seed: int,
    show: Callable[[int, float, float], None],
) -> Trained:
    """
    Trains a block's parameters in place, and keeps the best values that they had after a pass.

    Args:
        block: the block.
        loss: its loss.
        parameters: the parameters to train, by their names in the block.
        masks: the masks of these parameters, by the same names.
        settings: the settings.
        count: the number of windows of all ranks.
        seed: of the order of the windows.
        show: called after every pass with its number, the loss before the first pass, and the lowest loss so far.

    Raises:
        ValueError: the loss is not finite before training.
    """
    masters = Masters(parameters)
    optimizer = torch.optim.Adam(_by_scale(masters, masks, settings.learning_rate))
    training, judged = _parted(count, settings)
    steps = settings.passes * math.ceil(len(training) / settings.batch_size)
    schedule = LambdaLR(optimizer, lambda step: SCHEDULES[settings.schedule](step / steps))
    access = PlainAccess(masters, masks, [optimizer]) if masks else None
    half = any(parameter.dtype == torch.float16 for parameter in parameters.values())
    scaler = GradScaler(next(iter(parameters.values())).device.type, enabled=half)  # small gradients underflow
    order = torch.Generator().manual_seed(seed)
    before = lowest = loss.of(judged)
    if not math.isfinite(before):
        raise ValueError("the outputs of the pruned block, or of the dense one, are not finite")
    best, values = 0, masters.values()
    with only_trained(block, parameters):
        for number in range(1, settings.passes + 1):
            shuffled = torch.randperm(len(training), generator=order).split(settings.batch_size)
            for places in shuffled:
                masters.take_gradients(loss.gradients([training[p] for p in places.tolist()], parameters, scaler))
                _step(optimizer, access, scaler)
                schedule.step()
                masters.write()
            now = loss.of(judged)
            if now < lowest:
                lowest, best, values = now, number, masters.values()
            show(number, before, lowest)
            if number - best >= PATIENCE and 2 * number >= settings.passes:
                break
    masters.restore(values)
    return Trained(before, lowest, best, number * loss.tokens(training))


def _parted(count: int, settings: BlockReconstruction) -> tuple[range, range]:
    """Returns the places of the windows to train on, and of those that decide: the same ones if none are held out."""
    held = held_back(settings, count)
    training = range(count - held)
    return training, range(count - held, count) if held else training


def _step(optimizer: torch.optim.Optimizer, access: PlainAccess | None, scaler: GradScaler) -> None:
    """Makes an optimizer step that keeps pruned weights, and their moments, at zero."""
    scaler.unscale_(optimizer)
    if access is not None:
        access.mask_gradients()
    scaler.step(optimizer)
    scaler.update()
    if access is not None:
        access.after_step(optimizer)
    optimizer.zero_grad()


def _by_scale(masters: Masters, masks: MaskSet, rate: float) -> list[dict[str, object]]:
    """
    Returns the optimizer's groups: each parameter with a learning rate relative to the scale of its kept values.

    A parameter of zeros, such as a new bias, takes the scale of all matrices together.
    """
    named = dict(masters.named_parameters())
    scales = {name: _root_mean_square([value.detach()]) for name, value in named.items()}
    common = _root_mean_square([value.detach() for value in named.values() if value.ndim > 1])
    return [{"params": [value], "lr": rate * (scales[name] or common)} for name, value in named.items()]


def _root_mean_square(values: Sequence[Tensor]) -> float:
    """Returns the root mean square of the values that are not zero; 0 if all are."""
    count = sum(int(value.count_nonzero()) for value in values)
    return math.sqrt(sum(float(value.double().square().sum()) for value in values) / count) if count else 0.0
