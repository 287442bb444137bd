"""The loss of a block: the mean relative error of its outputs, over the windows of all ranks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from prune_callbacks.calibration.capture import block_output, hidden_of
from prune_callbacks.calibration.stand_ins import BlockInputs
from prune_callbacks.ranks import Ranks
from prune_callbacks.reconstruction.parameters import wide
from prune_callbacks.solvers.float64 import sum_in_float64

FLOOR = 1e-4
"""The smallest squared norm of a target that an error is divided by, relative to the mean over all tokens."""


class BlockLoss:
    """
    The mean relative error of a block's outputs: ||output - target||^2 / ||target||^2, over the real tokens.

    A vector along the last dimension is a token. The windows of all ranks count; each rank computes its own.

    Args:
        index: the index of the block.
        block: the block.
        inputs: the inputs of the block, one window each.
        goals: the same windows, with the target in place of the hidden states.
        order: the owners of all windows; see `Windows`.
        where: the device of the block.
        ranks: the processes.

    Raises:
        ValueError: a window has padding, and no mask fits the shape of its hidden states.
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

    @property
    def windows(self) -> int:
        """Returns the number of windows of all ranks."""
        return len(self._order)

    def _size(self, goal: BlockInputs) -> tuple[float, int]:
        """Returns the summed squared norm of a window's targets, and the number of its real tokens."""
        real = _real(goal, goal.hidden)
        return float(sum_in_float64(real.to(wide(real.dtype)).square())), real[..., 0].numel()

    def _error(self, number: int) -> Tensor:
        """Returns the summed error over a window of this rank."""
        goal = self._goals[number]
        output = _real(goal, hidden_of(block_output(self._index, self._block, self._inputs[number], self._where)))
        target = _real(goal, goal.hidden.to(self._where))
        target = target.to(wide(target.dtype))
        squares = (output.to(target.dtype) - target).square().sum(-1)
        return (squares / target.square().sum(-1).clamp(min=self._floor)).sum()

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
        """
        Returns the gradients of the loss on windows, by the parameters' names; a collective of the ranks.

        They are sums over windows and ranks, so they are float32 where parameters have 16 bits. `scaler` has scaled
        them. A parameter that a window does not reach, such as an expert's, has no gradient from it.
        """
        tensors = list(parameters.values())
        # Buffers of our own: autograd may return one tensor for two parameters, or one with other strides.
        total = [torch.zeros_like(t, dtype=wide(t.dtype), memory_format=torch.contiguous_format) for t in tensors]

        def add() -> None:
            for number in self._mine(places):
                with torch.enable_grad():
                    loss = scaler.scale(self._error(number) / self.tokens(places))
                if loss.requires_grad:
                    found = torch.autograd.grad(loss, tensors, allow_unused=True)
                    for whole, part in zip(total, found, strict=True):
                        if part is not None:
                            whole.add_(part)

        self._ranks.attempt(add)
        return {name: self._ranks.sum(gradient) for name, gradient in zip(parameters, total, strict=True)}


def _real(window: BlockInputs, values: Tensor) -> Tensor:
    """Returns the vectors of real tokens, of values (batch, tokens, features) or (batch * tokens, features)."""
    masks = [mask for mask in window.masks if mask is not None]
    for mask in masks:
        tokens = mask.to(values.device)
        if values.shape[:-1] == tokens.shape:
            return values[tokens]
        if values.shape[:-1] == (tokens.numel(),):
            return values[tokens.flatten()]
    if masks and None not in window.masks:
        raise ValueError(
            f"padding in the windows cannot be told from text in hidden states of shape {tuple(values.shape)}: "
            "give calibration windows without padding"
        )
    return values
