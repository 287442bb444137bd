"""SparseGPT and GPTQ in one sweep: prunes and rounds together."""

from dataclasses import dataclass

from torch import Tensor

from prune_callbacks.pruners.joint import Compensating, check_settings, check_single_weights, sweep_step, whole_groups
from prune_callbacks.pruners.protocol import check_pattern
from prune_callbacks.pruners.rounding import check_grid, sweep_width
from prune_callbacks.solvers.gptq import Grid, gptq
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class SparseGPTQ(Compensating):
    """
    Prunes and rounds in one sweep (Frantar & Alistarh 2023, joint sparsification and quantization).

    Equivalent to `SparseGPT` with every survivor also set to its nearest point of the grid; later columns compensate
    both errors. `Pruned.scale` has the scales. Takes `Unstructured` and `NM`.

    Args:
        pattern: the allowed masks, with the sparsity.
        grid: the grid that survivors are rounded to.
        block_size: how many columns are updated together and, for `Unstructured`, masked together.
        damping: added to the Gram's diagonal, as a fraction of the diagonal's mean; at least 0.

    Raises:
        ValueError: the pattern is neither of single weights nor N:M, its groups do not fit the grid's, or a setting is
            out of range.
    """

    pattern: Pattern
    grid: Grid = Grid()
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_pattern("SparseGPTQ", self.pattern)
        check_single_weights("SparseGPTQ", self.pattern, "Use GPTQ(MRP(...)) for other patterns")
        check_settings("SparseGPTQ", self.pattern, self.block_size, self.damping)
        check_grid("SparseGPTQ", self.grid, self.pattern)

    def solve(self, weight: Tensor, system: DampedGram, choose: Choose, heights: list[int]) -> Solved:
        """Calls `prune_callbacks.solvers.gptq.gptq`; see `Compensating.solve`."""
        width = sweep_width(whole_groups(self.block_size, self.pattern), self.grid, weight.shape[1])
        step = sweep_step(self.pattern, width)
        return gptq(weight, system, choose, step, width, self.grid, heights=heights)
