from .measured_allocation import MeasuredAllocation
from .sensitivity import Sensitivity, sensitivity
from .sensitivity_job import measure_sensitivity
from .sweep import sweep_job, sweep_point

__all__ = ["MeasuredAllocation", "Sensitivity", "measure_sensitivity", "sensitivity", "sweep_job", "sweep_point"]
