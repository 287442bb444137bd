"""Shares the targets of a stage out to ranks: those that are solved for together, to the rank with least to do."""

from collections.abc import Callable, Mapping, Sequence

from prune_callbacks.anatomy.target import Target
from prune_callbacks.pruners import Pruner
from prune_callbacks.pruners.questions import joint
from prune_callbacks.ranks import Ranks
from prune_callbacks.solvers import Gram
from prune_callbacks.solvers.statistics import GroupedStatistic, Statistic


def cost(targets: Sequence[Target], statistic: Statistic | None) -> float:
    """Returns the relative cost of solving: with a Gram a factorisation and a product per row, else one per weight."""
    shapes = [target.shape for target in targets]
    rows, size = sum(out for out, _ in shapes), shapes[0][1]
    whole = statistic.parts[0] if isinstance(statistic, GroupedStatistic) else statistic
    groups = targets[0].groups
    return float(size**2 * (size * groups / 3 + rows) if isinstance(whole, Gram) else size * rows)


def shared_out(costs: Sequence[float], ranks: Ranks) -> list[int]:
    """Returns the rank for every cost; costs are assigned in descending order, each to the rank of least total cost."""
    loads, owners = [0.0] * ranks.size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def sharing_an_input(
    targets: dict[str, Target], statistics: Mapping[str, Statistic], pruner_of: Callable[[str], Pruner]
) -> list[list[str]]:
    """Groups the targets, in order, that a joint pruner solves for together; any other target is a group by itself."""
    groups: dict[object, list[str]] = {}
    for name, target in targets.items():
        weight, statistic, pruner = target.parameter, statistics.get(name), pruner_of(name)
        together = (id(statistic), weight.dtype, weight.device, repr(pruner.pattern))
        shared = statistic is not None and target.groups == 1 and joint(pruner)
        groups.setdefault(together if shared else name, []).append(name)
    return list(groups.values())
