"""Running a model block by block over calibration windows, and pruning it on the way."""

from prune_callbacks.calibration.allocations import OWL, Allocation, LagrangianAllocation, SensitivityAllocation
from prune_callbacks.calibration.blocks import (
    SPARSE,
    find_blocks,
    find_language_model,
    find_targets,
    matrices,
    naming,
    oriented,
    parameter_name,
    parameters_of,
    sparse_experts,
    stored_input_first,
    weight_shape,
)
from prune_callbacks.calibration.engine import prune_sequentially
from prune_callbacks.calibration.experts import dense_in_mixtures, shape_of, told_dense
from prune_callbacks.calibration.permuting import permute_channels_
from prune_callbacks.calibration.prune_report import (
    LayerReport,
    PruneReport,
    free_memory,
    model_bytes,
    peak_memory,
    reset_peak_memory,
)
from prune_callbacks.calibration.saving import savable, save_sparse_model
from prune_callbacks.calibration.shrink import Scope, check_shrinkable, shrink_masks

__all__ = [
    "OWL",
    "SPARSE",
    "Allocation",
    "LagrangianAllocation",
    "LayerReport",
    "PruneReport",
    "Scope",
    "SensitivityAllocation",
    "check_shrinkable",
    "dense_in_mixtures",
    "find_blocks",
    "find_language_model",
    "find_targets",
    "free_memory",
    "matrices",
    "model_bytes",
    "naming",
    "oriented",
    "parameter_name",
    "parameters_of",
    "peak_memory",
    "reset_peak_memory",
    "permute_channels_",
    "prune_sequentially",
    "savable",
    "save_sparse_model",
    "shape_of",
    "shrink_masks",
    "sparse_experts",
    "stored_input_first",
    "told_dense",
    "weight_shape",
]
