"""Searches channel permutations that preserve more weight magnitude under N:M (Pool & Yu 2021)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from prune_callbacks.solvers.float64 import sum_in_float64
from prune_callbacks.solvers.precision import full_precision

MOST_PASSES = 60
ENOUGH = 2e-3
"""The fraction of the lost score that `PATIENCE` passes together must recover; otherwise the search ends."""
PATIENCE = 5


def kept_score(scores: Float[Tensor, "rows in"], n: int, m: int) -> float:
    """Returns the sum of the n largest scores of every group of m neighbouring columns."""
    return float(sum_in_float64(scores.unflatten(1, (-1, m)).topk(n, dim=-1).values))


@full_precision()
def channel_permutation(scores: Float[Tensor, "rows in"], n: int, m: int) -> Int64[Tensor, " in"]:
    """
    Returns an order of the columns for which N:M keeps at least as much score as for the given order.

    The permuted scores are `scores[:, order]`. The search starts from the better of two orders: the given one, and one
    that deals the columns out to the groups by falling sum, so that large columns are spread. Each pass then takes one
    column out of every group and puts them back where they add most. With the others of a group fixed, a column adds
    `sum over rows of max(0, score - the n-th largest of the others)`, so the best placement is a linear assignment
    (scipy) and the kept score never falls. A fixed random sequence selects the columns to take out, so the result is
    reproducible.

    Args:
        scores: scores of weights, (rows, in). Layers, or parts of one, whose columns must move together are stacked
            along the rows.
        n: columns kept in every group.
        m: columns in a group; divides `in`.
    """
    size = scores.shape[1]
    identity = torch.arange(size, device=scores.device)
    dealt = _dealt(scores.sum(0), size // m)
    order = max(identity, dealt, key=lambda o: kept_score(scores[:, o], n, m))
    if size == m:
        return identity
    groups = order.view(-1, m).clone()
    generator = torch.Generator().manual_seed(0)
    total = float(sum_in_float64(scores))
    lost = [total - kept_score(scores[:, groups.flatten()], n, m)]
    for _ in range(MOST_PASSES):
        slots = torch.randint(m, (len(groups),), generator=generator).to(groups.device)
        _reassign(scores, groups, slots, n)
        lost.append(total - kept_score(scores[:, groups.flatten()], n, m))
        if len(lost) > PATIENCE and lost[-1] >= (1 - ENOUGH) * lost[-1 - PATIENCE]:
            break
    return groups.flatten()


def _dealt(sums: Tensor, groups: int) -> Tensor:
    """Deals columns of falling sum out to the groups, back and forth; returns the groups one after another."""
    rounds = sums.argsort(descending=True, stable=True).view(-1, groups)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()


def _reassign(scores: Tensor, groups: Tensor, slots: Tensor, n: int) -> None:
    """Takes the column at `slots` out of every group and reassigns these columns optimally, in place."""
    from scipy.optimize import linear_sum_assignment  # imported here because the import takes half a second

    every = torch.arange(len(groups), device=groups.device)
    taken = groups[every, slots]
    others = torch.ones_like(groups, dtype=torch.bool)
    others[every, slots] = False
    rest = groups[others].view(len(groups), -1)
    hurdle = scores[:, rest].topk(n, dim=-1).values[..., -1]
    columns = scores[:, taken]
    # max(0, a - b) = (|a - b| + a - b) / 2, and the sum of |a - b| over rows is an L1 distance.
    distance = torch.cdist(columns.T.contiguous(), hurdle.T.contiguous(), p=1.0)
    gain = distance + columns.sum(0)[:, None] - hurdle.sum(0)
    _, places = linear_sum_assignment(gain.T.cpu().numpy(), maximize=True)
    groups[every, slots] = taken[torch.from_numpy(places).to(taken.device)]
