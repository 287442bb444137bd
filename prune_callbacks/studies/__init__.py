"""What pruning does to a model, measured one change at a time."""

from prune_callbacks.studies.sensitivity import Sensitivity, measure_sensitivity, sensitivity

__all__ = ["Sensitivity", "measure_sensitivity", "sensitivity"]
