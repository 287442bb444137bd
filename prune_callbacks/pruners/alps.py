"""ALPS: optimizes mask and weights together."""

from dataclasses import dataclass

from torch import Tensor

from prune_callbacks.pruners.joint import Compensating, check_settings, check_survivors
from prune_callbacks.pruners.protocol import check_pattern
from prune_callbacks.solvers.alps import alps
from prune_callbacks.solvers.linalg import DampedGram
from prune_callbacks.solvers.solved import Solved
from prune_callbacks.solvers.sparsegpt import Choose
from prune_callbacks.sparsity import Pattern


@dataclass(frozen=True)
class ALPS(Compensating):
    """
    Optimizes mask and weights together, then solves exactly for the weights under the mask (Meng et al. 2024).

    "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models". Takes every pattern
    except `Rows`. The loss is never above the loss of `MRP(pattern, block_size=None)` on the same layer, up to ALPS's
    tolerance.

    Args:
        pattern: the allowed masks, with the sparsity. The pool of `Unstructured` is the layer, or a row if `per="row"`.
        damping: added to the Gram's diagonal, as a fraction of the diagonal's mean; at least 0.

    Raises:
        ValueError: the pattern may remove whole rows, or `damping` is out of range.
    """

    pattern: Pattern
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_pattern("ALPS", self.pattern)
        check_survivors("ALPS", self.pattern)
        check_settings("ALPS", self.pattern, None, self.damping)

    def solve(self, weight: Tensor, system: DampedGram, choose: Choose, heights: list[int]) -> Solved:
        """Calls `prune_callbacks.solvers.alps.alps`; see `Compensating.solve`."""
        return alps(weight, system, choose, heights)
