from .calibration import PruneReport, prune_sequentially
from .callbacks import IterativePrune, LoRARecovery, MaskEnforcer, OneShotPrune, Rewind, RunReport, SparsityMonitor
from .consolidation import consolidate
from .pruners import ALPS, MRP, Magnitude, Pruned, SparseGPT, Wanda
from .solvers import Gram, InputNorm
from .sparsity import (
    NM,
    Block,
    Columns,
    ConstantSchedule,
    CubicSchedule,
    IMPSchedule,
    LinearSchedule,
    MaskSet,
    Rows,
    Unstructured,
)
from .tasks import CausalLM, LanguageModeling, LogitsDistillation, SquareHead, TokenDataModule

__all__ = [
    "ALPS",
    "MRP",
    "NM",
    "Block",
    "CausalLM",
    "Columns",
    "ConstantSchedule",
    "CubicSchedule",
    "Gram",
    "IMPSchedule",
    "InputNorm",
    "IterativePrune",
    "LanguageModeling",
    "LinearSchedule",
    "LoRARecovery",
    "LogitsDistillation",
    "Magnitude",
    "MaskEnforcer",
    "MaskSet",
    "OneShotPrune",
    "PruneReport",
    "Pruned",
    "Rewind",
    "Rows",
    "RunReport",
    "SparseGPT",
    "SparsityMonitor",
    "SquareHead",
    "TokenDataModule",
    "Unstructured",
    "Wanda",
    "consolidate",
    "prune_sequentially",
]
