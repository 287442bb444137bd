"""GPTQ: rounds the survivors of another pruner."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prune_callbacks.pruners.joint import as_compensating, check_settings, solve_together
from prune_callbacks.pruners.protocol import Pruned, Pruner, check_pruner, widened
from prune_callbacks.pruners.questions import coupled, rounds
from prune_callbacks.pruners.rounding import check_grid, sweep_width
from prune_callbacks.solvers.gptq import Grid, gptq
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.solvers.statistics import Gram, Statistic
from prune_callbacks.sparsity import Pattern, Unstructured


@dataclass(frozen=True)
class GPTQ:
    """
    Rounds the survivors of another pruner to a grid and holds its mask exactly (Frantar et al. 2022).

    Equivalent to the pruner followed by GPTQ's sweep over its weights, in which removed weights stay zero. The loss is
    measured against the dense weights. Weights of features that no token activated are rounded to their nearest point.
    If the pruner compensates, one factorisation of the Gram serves both. `Pruned.scale` has the scales.

    Args:
        pruner: the pruner that runs first. None: no further weight is removed, and zeros stay zero.
        grid: the grid that survivors are rounded to.
        block_size: how many columns are updated together.
        damping: added to the Gram's diagonal, as a fraction of the diagonal's mean. None: the pruner's damping, or 0.01
            if it has none.

    Raises:
        ValueError: the pruner removes coupled units or rounds by itself, or a setting is out of range.
    """

    pruner: Pruner | None = None
    grid: Grid = Grid()
    block_size: int = 128
    damping: float | None = None

    def __post_init__(self) -> None:
        if self.pruner is not None:
            check_pruner("GPTQ", self.pruner, "Wanda(NM(2, 4))")
        if self.pruner is not None and coupled(self.pruner):
            raise ValueError(
                f"GPTQ rounds layers one by one: prune by {type(self.pruner).__name__} first, then use GPTQ()"
            )
        if self.pruner is not None and rounds(self.pruner):
            raise ValueError(f"GPTQ takes a pruner that does not round, got {self.pruner!r}; use that by itself")
        check_settings("GPTQ", self.pattern, self.block_size, self._damping)
        check_grid("GPTQ", self.grid, self.pattern)

    @property
    def pattern(self) -> Pattern:
        """Returns the pruner's pattern; without a pruner, a pattern that removes nothing."""
        return Unstructured(0.0) if self.pruner is None else self.pruner.pattern

    @property
    def _damping(self) -> float:
        if self.damping is not None:
            return self.damping
        compensating = as_compensating(self.pruner)
        return 0.01 if compensating is None else compensating.damping

    def statistic(self, in_features: int, device: torch.device | str | None = None) -> Gram:
        """Makes an empty Gram of the layer's inputs, which every pruner can use."""
        return Gram(in_features, device)

    def prune(self, weight: Float[Tensor, "out in"], statistic: Statistic | None) -> Pruned:
        """Prunes and rounds one layer; see `prune_callbacks.solvers.gptq.gptq` and `Pruner`."""
        return self.prune_together([weight], statistic)[0]

    def prune_together(self, weights: Sequence[Float[Tensor, "_ in"]], statistic: Statistic | None) -> list[Pruned]:
        """Prunes and rounds layers that share their input; see `JointPruner`."""

        def solve(weight: Tensor, system: DampedGram, choose: Choose, heights: list[int]) -> Solved:
            compensating = as_compensating(self.pruner)
            if compensating is not None:
                sparse, keep, *_ = compensating.solve(weight, system, choose, heights)
            elif self.pruner is not None:
                pruned = [self.pruner.prune(dense, statistic) for dense in weights]
                sparse = torch.cat([widened(result.weight, statistic) for result in pruned])
                keep = torch.cat([result.keep.to(weight.device) for result in pruned])
            else:
                sparse, keep = weight, weight != 0
            return self._rounded(sparse * keep, keep, system)

        return solve_together(self, weights, statistic, self._damping, solve)

    def _rounded(self, sparse: Tensor, keep: Tensor, system: DampedGram) -> Solved:
        """Returns the survivors on the grid, the unchanged mask, and the scales."""

        def held(scores: Tensor, start: int) -> Tensor:
            return keep[:, start : start + scores.shape[1]]

        width = sweep_width(self.block_size, self.grid, sparse.shape[1])
        solved, kept, _, scale = gptq(sparse, system, held, width, width, self.grid, unseen=sparse)
        assert scale is not None
        # Calibration never saw these features, so the solver would set them to zero; at inference they may be active.
        unseen = self.grid.spread(scale, sparse.shape[1])[:, system.dead]
        solved[:, system.dead] = self.grid.rounded(sparse[:, system.dead], unseen)
        return Solved(solved, kept, None, scale)  # None: `as_pruned` computes the loss against the dense weights
