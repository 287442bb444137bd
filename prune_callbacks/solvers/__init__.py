"""How survivors are scored, compensated and rounded: statistics, linear algebra, one solver a file. Tensors only."""

from prune_callbacks.solvers.gptq import Grid
from prune_callbacks.solvers.linalg import DampedGram, NumericalError
from prune_callbacks.solvers.statistics import Gram, InputNorm, Statistic

__all__ = ["DampedGram", "Gram", "Grid", "InputNorm", "NumericalError", "Statistic"]
