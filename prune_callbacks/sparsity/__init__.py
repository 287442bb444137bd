"""Patterns, exact selection of scores, masks and sparsity schedules, on tensors alone."""

from prune_callbacks.sparsity.masks import MaskSet
from prune_callbacks.sparsity.patterns import NM, Pattern, Unstructured
from prune_callbacks.sparsity.schedules import ConstantSchedule, CubicSchedule, IMPSchedule, LinearSchedule, Schedule
from prune_callbacks.sparsity.selection import keep_largest, keep_largest_of_all
from prune_callbacks.sparsity.structures import Block, Columns, Rows

__all__ = [
    "NM",
    "Block",
    "Columns",
    "ConstantSchedule",
    "CubicSchedule",
    "IMPSchedule",
    "LinearSchedule",
    "MaskSet",
    "Pattern",
    "Rows",
    "Schedule",
    "Unstructured",
    "keep_largest",
    "keep_largest_of_all",
]
