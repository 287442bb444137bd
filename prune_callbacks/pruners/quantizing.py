"""Pruners that also round: SparseGPT and GPTQ in one sweep, and GPTQ under the mask of any pruner."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.joint import Compensating, check_settings, solved_together, step_of, whole_units
from prune_callbacks.pruners.protocol import Pruned, Pruner, check_pattern, check_pruner, widened
from prune_callbacks.pruners.structured import Structured
from prune_callbacks.solvers.gptq import Grid, gptq
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.solvers.statistics import Gram, Statistic
from prune_callbacks.sparsity import NM, Pattern, Unstructured


@dataclass(frozen=True)
class SparseGPTQ:
    """
    Prunes and rounds in one sweep (Frantar & Alistarh 2023, joint sparsification and quantization).

    Equivalent to `SparseGPT` where every kept weight is also set to its nearest point of the grid, and the error of
    both pushed on. `Pruned.scale` has the scales. Takes `Unstructured` and `NM`.

    Args:
        pattern: what to remove.
        grid: what the survivors are rounded to.
        block_size: columns that are updated together, and of `Unstructured` masked together.
        damping: added to the Gram's diagonal, as a fraction of its mean.
    """

    pattern: Pattern
    grid: Grid = Grid()
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_pattern("SparseGPTQ", self.pattern)
        if not isinstance(self.pattern, Unstructured | NM):
            raise ValueError(
                f"SparseGPTQ chooses single weights while it sweeps over the columns and cannot prune {self.pattern}; "
                "it takes Unstructured and NM. Use GPTQ(MRP(...)) for other patterns"
            )
        check_settings("SparseGPTQ", self.pattern, self.block_size, self.damping)
        _check_grid("SparseGPTQ", self.grid, self.pattern)

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram of the layer's inputs."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """See `prune_callbacks.solvers.gptq.gptq` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """See `JointPruner`."""

        def solve(weight: Tensor, system: DampedGram, keep_best: Choose, heights: list[int]) -> tuple[Tensor, ...]:
            width = _block(whole_units(self.block_size, self.pattern), self.grid, weight.shape[1])
            return gptq(weight, system, keep_best, step_of(self.pattern, width), width, self.grid)

        return solved_together(self, weights, statistic, self.damping, solve)


@dataclass(frozen=True)
class GPTQ:
    """
    Rounds what another pruner keeps (Frantar et al. 2022), its mask held exactly.

    Equivalent to the pruner, then GPTQ's sweep over its weights in which removed ones stay zero; the loss is that
    against the dense weights. Weights of features that no token activated go to their nearest point. One factorisation
    of the Gram serves both where the pruner compensates. `Pruned.scale` has the scales.

    Args:
        pruner: what prunes first. None: nothing more goes, and what is zero stays zero.
        grid: what the survivors are rounded to.
        block_size: columns that are updated together.
        damping: added to the Gram's diagonal, as a fraction of its mean. None: that of the pruner, 0.01 if it has none.
    """

    pruner: Pruner | None = None
    grid: Grid = Grid()
    block_size: int = 128
    damping: float | None = None

    def __post_init__(self) -> None:
        if self.pruner is not None:
            check_pruner("GPTQ", self.pruner, "Wanda(NM(2, 4))")
        if isinstance(self.pruner, Structured):
            raise ValueError("GPTQ rounds layers one by one: prune by Structured first, then use GPTQ()")
        if isinstance(self.pruner, SparseGPTQ | GPTQ):
            raise ValueError(f"GPTQ takes a pruner that does not round, got {self.pruner!r}; use that by itself")
        check_settings("GPTQ", self.pattern, self.block_size, self._damping)
        _check_grid("GPTQ", self.grid, self.pattern)

    @property
    def pattern(self) -> Pattern:
        """That of the pruner; without one, a pattern that removes nothing."""
        return Unstructured(0.0) if self.pruner is None else self.pruner.pattern

    @property
    def _damping(self) -> float:
        if self.damping is not None:
            return self.damping
        return self.pruner.damping if isinstance(self.pruner, Compensating) else 0.01

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """The Gram of the layer's inputs, which every pruner can use."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """See `prune_callbacks.solvers.gptq.gptq` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """See `JointPruner`."""

        def solve(weight: Tensor, system: DampedGram, keep_best: Choose, heights: list[int]) -> tuple[Tensor, ...]:
            if isinstance(self.pruner, Compensating):
                sparse, keep = self.pruner.solve(weight, system, keep_best, heights)
            elif self.pruner is not None:
                pruned = [self.pruner.prune(dense, statistic) for dense in weights]
                sparse = torch.cat([widened(result.weight, statistic) for result in pruned])
                keep = torch.cat([result.keep.to(weight.device) for result in pruned])
            else:
                sparse, keep = weight, weight != 0
            return self._rounded(sparse * keep, keep, system)

        return solved_together(self, weights, statistic, self._damping, solve)

    def _rounded(self, sparse: Tensor, keep: Tensor, system: DampedGram) -> tuple[Tensor, Tensor, Tensor]:
        """The survivors on the grid, their mask as it was, and the scales."""

        def held(scores: Tensor, start: int) -> Tensor:
            return keep[:, start : start + scores.shape[1]]

        width = _block(self.block_size, self.grid, sparse.shape[1])
        solved, kept, scale = gptq(sparse, system, held, width, width, self.grid, unseen=sparse)
        # Of features that calibration never saw nothing is known: not their cost, but also not that they do nothing.
        unseen = self.grid.spread(scale, sparse.shape[1])[:, system.dead]
        solved[:, system.dead] = self.grid.rounded(sparse[:, system.dead], unseen)
        return solved, kept, scale


def _block(block_size: int, grid: Grid, in_features: int) -> int:
    """Columns swept together so that every group of the grid lies in one block or begins where one does."""
    width = grid.width(in_features)
    if width <= block_size:
        return block_size - block_size % width
    return block_size if width == in_features or width % block_size == 0 else width


def _check_grid(name: str, grid: Grid, pattern: Pattern) -> None:
    if not isinstance(grid, Grid):
        raise ValueError(f"{name} takes a grid such as Grid(bits=4, group_size=128), got {grid!r}")
    if isinstance(pattern, NM) and grid.group_size is not None and grid.group_size % pattern.m:
        raise ValueError(
            f"{name}: group_size must be a multiple of the {pattern.m} columns that {pattern} decides together, got "
            f"{grid.group_size}"
        )
