from .allocation.by_sensitivity import SensitivityAllocation
from .allocation.lagrangian import LagrangianAllocation
from .allocation.owl import OWL
from .calibration.written import write_windows
from .callbacks import (
    IterativePrune,
    LoRARecovery,
    MaskEnforcer,
    OneShotPrune,
    PermuteChannels,
    QuantizeWeights,
    Rewind,
    RunReport,
    SemiStructuredConvert,
    ShrinkModel,
    SparsityBenchmark,
    SparsityMonitor,
)
from .deploy import convert_, load_compressed, measure_compression, revert_, save_compressed, shrink
from .engine.permuting import permute_channels_
from .engine.reconstruct import reconstruct_
from .engine.report import PruneReport
from .engine.sequential import prune_sequentially
from .measure import ZeroShot
from .pruners import ALPS, GPTQ, MRP, RIA, Magnitude, Pruned, SparseGPT, SparseGPTQ, Structured, Wanda
from .reconstruction.settings import BlockReconstruction
from .solvers import Gram, Grid, InputNorm
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
from .storage.consolidation import consolidate
from .streaming import prune_checkpoint
from .studies.measured_allocation import MeasuredAllocation
from .tasks import CausalLM, LanguageModeling, LogitsDistillation, SquareHead, TokenDataModule

__all__ = [
    "ALPS",
    "GPTQ",
    "MRP",
    "NM",
    "OWL",
    "RIA",
    "Block",
    "BlockReconstruction",
    "CausalLM",
    "Columns",
    "ConstantSchedule",
    "CubicSchedule",
    "Gram",
    "Grid",
    "IMPSchedule",
    "InputNorm",
    "IterativePrune",
    "LagrangianAllocation",
    "LanguageModeling",
    "LinearSchedule",
    "LoRARecovery",
    "LogitsDistillation",
    "Magnitude",
    "MaskEnforcer",
    "MaskSet",
    "MeasuredAllocation",
    "OneShotPrune",
    "PermuteChannels",
    "PruneReport",
    "Pruned",
    "QuantizeWeights",
    "Rewind",
    "Rows",
    "RunReport",
    "SemiStructuredConvert",
    "SensitivityAllocation",
    "ShrinkModel",
    "SparseGPT",
    "SparseGPTQ",
    "SparsityBenchmark",
    "SparsityMonitor",
    "SquareHead",
    "Structured",
    "TokenDataModule",
    "Unstructured",
    "Wanda",
    "ZeroShot",
    "consolidate",
    "convert_",
    "load_compressed",
    "measure_compression",
    "permute_channels_",
    "prune_checkpoint",
    "prune_sequentially",
    "reconstruct_",
    "revert_",
    "save_compressed",
    "shrink",
    "write_windows",
]
