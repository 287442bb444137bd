"""Lightning callbacks: they decide when. What is done lies in the packages below."""

from prune_callbacks.callbacks.iterative_prune import IterativePrune
from prune_callbacks.callbacks.lora_recovery import LoRARecovery
from prune_callbacks.callbacks.mask_enforcer import MaskEnforcer
from prune_callbacks.callbacks.one_shot_prune import OneShotPrune
from prune_callbacks.callbacks.permute_channels import PermuteChannels
from prune_callbacks.callbacks.quantize_weights import QuantizeWeights
from prune_callbacks.callbacks.rewind import Rewind
from prune_callbacks.callbacks.run_report import RunReport
from prune_callbacks.callbacks.semi_structured_convert import SemiStructuredConvert
from prune_callbacks.callbacks.shrink_model import ShrinkModel
from prune_callbacks.callbacks.sparsity_benchmark import SparsityBenchmark
from prune_callbacks.callbacks.sparsity_monitor import SparsityMonitor

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
