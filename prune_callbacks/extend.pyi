from .allocation.protocol import Allocation
from .contract import check_contract
from .parallel.access import ParamAccess, Span
from .parallel.strategies import Served, register_strategy
from .pruners.protocol import (
    JointPruner,
    Pruned,
    Pruner,
    as_pruned,
    check_pattern,
    check_statistic,
    check_weight,
    widened,
)
from .pruners.scored import Scored, ScorePruner
from .ranks import Ranks
from .solvers.linalg import NumericalError
from .solvers.statistics import Gram, InputNorm, Statistic
from .sparsity.patterns import Pattern, check_sparsity, removed_units
from .sparsity.questions import Pool
from .sparsity.schedules import Schedule
from .sparsity.selection import keep_largest, refuse_nan

__all__ = [
    "Allocation",
    "Gram",
    "InputNorm",
    "JointPruner",
    "ParamAccess",
    "Pattern",
    "Pool",
    "Pruned",
    "Pruner",
    "Schedule",
    "Scored",
    "Served",
    "Span",
    "Statistic",
    "as_pruned",
    "check_contract",
    "check_statistic",
    "check_weight",
    "keep_largest",
    "refuse_nan",
    "register_strategy",
    "widened",
    "NumericalError",
    "Ranks",
    "ScorePruner",
    "check_pattern",
    "check_sparsity",
    "removed_units",
]
