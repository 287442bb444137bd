"""How survivors are scored and compensated: statistics, linear algebra, SparseGPT, MRP. Tensors only."""

from prune_callbacks.solvers.linalg import DampedGram, NumericalError
from prune_callbacks.solvers.statistics import Gram, InputNorm, Statistic

__all__ = ["DampedGram", "Gram", "InputNorm", "NumericalError", "Statistic"]
