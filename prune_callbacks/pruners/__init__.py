"""Pruners: a score, a pattern and a solver as a frozen value behind one Protocol; one method per file."""

from prune_callbacks.pruners.alps import ALPS
from prune_callbacks.pruners.gptq import GPTQ
from prune_callbacks.pruners.magnitude import Magnitude
from prune_callbacks.pruners.mrp import MRP
from prune_callbacks.pruners.protocol import JointPruner, Pruned, Pruner, check_pruner, check_weight
from prune_callbacks.pruners.ria import RIA
from prune_callbacks.pruners.scored import Scored
from prune_callbacks.pruners.sparsegpt import SparseGPT
from prune_callbacks.pruners.sparsegptq import SparseGPTQ
from prune_callbacks.pruners.structured import Structured
from prune_callbacks.pruners.wanda import Wanda

__all__ = [
    "ALPS",
    "GPTQ",
    "MRP",
    "RIA",
    "JointPruner",
    "Magnitude",
    "Pruned",
    "Pruner",
    "Scored",
    "SparseGPT",
    "SparseGPTQ",
    "Structured",
    "Wanda",
    "check_pruner",
    "check_weight",
]
