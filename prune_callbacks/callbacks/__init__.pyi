from .iterative_prune import IterativePrune
from .lora_recovery import LoRARecovery
from .mask_enforcer import MaskEnforcer
from .one_shot_prune import OneShotPrune
from .permute_channels import PermuteChannels
from .quantize_weights import QuantizeWeights
from .rewind import Rewind
from .run_report import RunReport
from .semi_structured_convert import SemiStructuredConvert
from .shrink_model import ShrinkModel
from .sparsity_benchmark import SparsityBenchmark
from .sparsity_monitor import SparsityMonitor

__all__ = [
    "IterativePrune",
    "LoRARecovery",
    "MaskEnforcer",
    "OneShotPrune",
    "PermuteChannels",
    "QuantizeWeights",
    "Rewind",
    "RunReport",
    "SemiStructuredConvert",
    "ShrinkModel",
    "SparsityBenchmark",
    "SparsityMonitor",
]
