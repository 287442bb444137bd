"""SparseGPT: prunes and compensates in one sweep over the columns."""

from dataclasses import dataclass

from torch import Tensor

from prune_callbacks.pruners.joint import Compensating, check_settings, check_single_weights, sweep_step, whole_groups
from prune_callbacks.pruners.protocol import check_pattern
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose, sparsegpt
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class SparseGPT(Compensating):
    """
    Prunes by one sweep of Optimal Brain Surgeon over the columns (Frantar & Alistarh 2023).

    Takes `Unstructured` (the pool is a block of columns over all rows) and `NM`.

    Args:
        pattern: the allowed masks, with the sparsity.
        block_size: how many columns are masked and updated together; rounded down to whole groups of an N:M pattern.
        damping: added to the Gram's diagonal, as a fraction of the diagonal's mean; at least 0.

    Raises:
        ValueError: the pattern is neither of single weights nor N:M, or a setting is out of range.
    """

    pattern: Pattern
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_pattern("SparseGPT", self.pattern)
        check_single_weights(
            "SparseGPT",
            self.pattern,
            "Use Wanda or Magnitude for Rows, and MRP, Wanda or Magnitude for Columns and Block.",
        )
        check_settings("SparseGPT", self.pattern, self.block_size, self.damping)

    def solve(self, weight: Tensor, system: DampedGram, choose: Choose, heights: list[int]) -> Solved:
        """Calls `prune_callbacks.solvers.sparsegpt.sparsegpt`; see `Compensating.solve`."""
        width = whole_groups(self.block_size, self.pattern)
        return sparsegpt(weight, system, choose, sweep_step(self.pattern, width), width, heights)
