from .calibration import PruneReport, prune_sequentially
from .callbacks import MaskEnforcer, OneShotPrune, RunReport
from .pruners import ALPS, MRP, Magnitude, Pruned, SparseGPT, Wanda
from .solvers import Gram, InputNorm
from .sparsity import NM, Block, Columns, MaskSet, Rows, Unstructured
from .tasks import CausalLM, TokenDataModule

__all__ = [
    "ALPS",
    "MRP",
    "NM",
    "Block",
    "CausalLM",
    "Columns",
    "Gram",
    "InputNorm",
    "Magnitude",
    "MaskEnforcer",
    "MaskSet",
    "OneShotPrune",
    "PruneReport",
    "Pruned",
    "Rows",
    "RunReport",
    "SparseGPT",
    "TokenDataModule",
    "Unstructured",
    "Wanda",
    "prune_sequentially",
]
