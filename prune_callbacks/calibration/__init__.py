"""Running a model block by block over calibration windows, and pruning it on the way."""

from prune_callbacks.calibration.allocating import OWL, Allocation, LagrangianAllocation, SensitivityAllocation
from prune_callbacks.calibration.blocks import (
    find_blocks,
    find_language_model,
    find_targets,
    naming,
    oriented,
    parameter_name,
    parameters_of,
    stored_input_first,
    weight_shape,
)
from prune_callbacks.calibration.engine import prune_sequentially
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
    "Allocation",
    "LagrangianAllocation",
    "LayerReport",
    "PruneReport",
    "Scope",
    "SensitivityAllocation",
    "check_shrinkable",
    "find_blocks",
    "find_language_model",
    "find_targets",
    "free_memory",
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
    "shrink_masks",
    "stored_input_first",
    "weight_shape",
]
