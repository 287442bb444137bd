"""Which weights stay: patterns, exact selection and masks. Tensors only."""

from prune_callbacks.sparsity.masks import MaskSet
from prune_callbacks.sparsity.patterns import NM, Block, Columns, Pattern, Rows, Unstructured

__all__ = ["NM", "Block", "Columns", "MaskSet", "Pattern", "Rows", "Unstructured"]
