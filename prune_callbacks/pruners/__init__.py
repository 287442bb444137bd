"""Pruners: score, pattern and solver, as frozen values behind one Protocol."""

from prune_callbacks.pruners.compensating import ALPS, MRP, SparseGPT
from prune_callbacks.pruners.protocol import JointPruner, Pruned, Pruner, check_pruner, check_weight
from prune_callbacks.pruners.quantizing import GPTQ, SparseGPTQ
from prune_callbacks.pruners.scored import Magnitude, Wanda
from prune_callbacks.pruners.structured import Structured

__all__ = [
    "ALPS",
    "GPTQ",
    "MRP",
    "JointPruner",
    "Magnitude",
    "Pruned",
    "Pruner",
    "SparseGPT",
    "SparseGPTQ",
    "Structured",
    "Wanda",
    "check_pruner",
    "check_weight",
]
