"""Calibration statistics, linear algebra, and the solvers (one per file) that prune, compensate and round tensors."""

from prune_callbacks.solvers.gptq import Grid
from prune_callbacks.solvers.linalg import DampedGram, NumericalError
from prune_callbacks.solvers.statistics import Gram, InputNorm, Statistic

__all__ = ["DampedGram", "Gram", "Grid", "InputNorm", "NumericalError", "Statistic"]
