"""Prunes a weight whose rows fall into groups, as a grouped convolution's, and measures what that cost."""

import torch
from torch import Tensor

from prune_callbacks.pruners import Pruned, Pruner
from prune_callbacks.solvers import Gram
from prune_callbacks.solvers.linalg import quadratic_form
from prune_callbacks.solvers.statistics import Statistic, by_group


def prune_by_group(pruner: Pruner, weight: Tensor, statistic: Statistic | None, groups: int) -> Pruned:
    """Prunes a weight whose rows fall into groups, each with inputs of its own, group by group."""
    if groups == 1:
        return pruner.prune(weight, statistic)
    statistics = by_group(statistic) if statistic is not None else [None] * groups
    done = [pruner.prune(part, known) for part, known in zip(weight.chunk(groups), statistics, strict=True)]
    losses = [part.loss for part in done if part.loss is not None]
    loss = sum(losses) if len(losses) == groups else None
    return Pruned(torch.cat([part.weight for part in done]), torch.cat([part.keep for part in done]), loss)


def relative_loss(weight: Tensor, pruned: Pruned, statistic: Statistic | None) -> float | None:
    """Returns the loss over the squared norm of the dense output; None without a Gram. Costs one product `W G`."""
    grams = by_group(statistic)
    if pruned.loss is None or not isinstance(grams[0], Gram):
        return None
    parts = zip(weight.chunk(len(grams)), grams, strict=True)
    output = sum(quadratic_form(part.to(gram.matrix), gram.matrix) for part, gram in parts)
    return pruned.loss / output if output > 0 else 0.0
