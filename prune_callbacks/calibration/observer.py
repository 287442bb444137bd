"""Adds what enters the layers of a block to statistics, pass by pass."""

import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from contextlib import suppress

import torch
from torch import Tensor, nn

from prune_callbacks.anatomy.target import Target
from prune_callbacks.calibration.pairs import Masks
from prune_callbacks.solvers.statistics import Statistic

Pass = tuple[Masks, Callable[[], object]]
"""A forward pass on one batch: the masks of its real tokens, and the function that runs it."""


class _AllSeenError(Exception):
    """Ends a pass when all layers have been observed."""


class SometimesSharedError(Exception):
    """A layer shares its input with another one in one call, and not in another."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Observer:
    """
    Adds the inputs of a block's layers to statistics, one batch after another.

    Args:
        make: makes the empty statistic of a target.
        targets: the targets, by name.
        alone: the names of targets that share no statistic.

    Attributes:
        statistics: the statistic of every leader: the first of the layers with the same input features.
        leaders: the leader of every layer observed so far.
        masks: the masks of the running batch; () if all tokens are real.
    """

    def __init__(self, make: Callable[[Target], Statistic], targets: Mapping[str, Target], alone: Set[str]) -> None:
        self.statistics: dict[str, Statistic] = {}
        self.leaders: dict[str, str] = {}
        self.masks: Masks = ()
        self._make = make
        self._targets = targets
        self._names = sorted(name for name, target in targets.items() if target.seen_by != "never")
        self._alone = alone
        self._seen: dict[Hashable, tuple[weakref.ref[Tensor], int, str]] = {}
        self._calls: list[tuple[str, torch.Size]] = []
        # The calls of a complete pass, if later passes may end at the last of them.
        self._whole: list[tuple[str, torch.Size]] | None = None
        self._untold: set[str] = set()

    def run(self, block: nn.Module, passes: Sequence[Pass], where: torch.device) -> bool:
        """
        Makes all passes: the first completely, others until the last layer is observed.

        Returns:
            whether the block was called in any of them.
        """
        called: list[bool] = []
        hook = block.register_forward_pre_hook(lambda *_: called.append(True))
        try:
            for number, (masks, run) in enumerate(passes):
                self._seen.clear()
                self._calls.clear()
                self.masks = tuple(None if mask is None else mask.to(where) for mask in masks)
                with suppress(_AllSeenError):
                    run()
                if number == 0 and sorted(name for name, _ in self._calls) == self._names:  # experts are never called
                    self._whole = self._calls.copy()
        finally:
            hook.remove()
        self._seen.clear()
        return bool(called or self.leaders)

    def observe(self, name: str, x: Tensor) -> None:
        """Records a call of layer `name` with `x`."""
        leader = name if name in self._alone else self._leader(name, x)
        if self.leaders.setdefault(name, leader) != leader:
            raise SometimesSharedError(name)
        if leader == name:
            self.count_real(name, x)
        self._calls.append((name, x.shape))
        if self._calls == self._whole:
            raise _AllSeenError

    def first_mask(self) -> Tensor | None:
        """Returns the mask of real tokens of the running batch, or of its first sequence; None: all are real."""
        return self.masks[0] if self.masks else None

    def _leader(self, name: str, x: Tensor) -> str:
        """Returns the first layer that had the same input tensor in this pass, with the same contents, or `name`."""
        key = (id(x), self._targets[name].reading)
        version = 0 if x.is_inference() else x._version
        tensor, before, leader = self._seen.get(key, (lambda: None, 0, name))
        if tensor() is x and before == version:
            return leader
        self._seen[key] = (weakref.ref(x), version, name)  # an id may be used again, and contents change in place
        return name

    def count_real(self, name: str, x: Tensor) -> None:
        """Adds the inputs of real tokens; if they cannot be identified, warns once and adds all inputs."""
        patches = self._targets[name].convolution
        real = x if not self.masks else None if patches else _real(x, self.masks)
        if real is None and name not in self._untold:
            self._untold.add(name)
            warnings.warn(
                f"{name} gets inputs of shape {tuple(x.shape)}, in which padding cannot be identified: all count. "
                "Give calibration windows without padding",
                stacklevel=3,
            )
        self.count(name, x if real is None else real)

    def count(self, name: str, x: Tensor) -> None:
        """Adds all inputs `x` of a layer."""
        self.leaders[name] = name
        if name not in self.statistics:
            self.statistics[name] = self._make(self._targets[name])
        for vectors in self._targets[name].vectors(x):
            self.statistics[name].update(vectors)


def _real(x: Tensor, masks: Masks) -> Tensor | None:
    """Returns the inputs of real tokens, by the mask of their shape; None if no mask has it and all have padding."""
    found = (_masked(x, mask) for mask in masks if mask is not None)
    return next((real for real in found if real is not None), x if None in masks else None)


def _masked(x: Tensor, tokens: Tensor) -> Tensor | None:
    """Returns the inputs of real tokens, given the mask (batch, tokens); None if the shapes do not identify them."""
    if x.ndim > 2 and x.shape[:2] == tokens.shape:
        return x[tokens]
    if x.ndim == 2 and len(x) == tokens.numel():  # OPT's MLP sees flat tokens
        return x[tokens.flatten()]
    if x.ndim == 4 and (len(x), x.shape[2]) == tokens.shape:  # (batch, heads, tokens, in): DeepSeek's kv_b_proj
        return x.transpose(1, 2)[tokens]
    return None
