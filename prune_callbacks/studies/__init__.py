"""Measures the effect of pruning on a model, one change at a time."""

from prune_callbacks.studies.sensitivity import Sensitivity, sensitivity
from prune_callbacks.studies.sensitivity_job import measure_sensitivity
from prune_callbacks.studies.sweep import sweep_job, sweep_point

__all__ = ["Sensitivity", "measure_sensitivity", "sensitivity", "sweep_job", "sweep_point"]
