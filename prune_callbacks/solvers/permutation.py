"""Which input channels to put next to each other, so that N:M keeps more of the score (Pool & Yu 2021)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MOST_PASSES = 60
ENOUGH = 2e-3
"""The share of the lost score that `PATIENCE` passes together must bring back, or the search ends."""
PATIENCE = 5


def kept_score(scores: Float[Tensor, "rows in"], n: int, m: int) -> float:
    """The sum of the n largest scores of every m neighbours."""
    return float(scores.unflatten(1, (-1, m)).topk(n, dim=-1).values.sum(dtype=torch.float64))


def channel_permutation(scores: Float[Tensor, "rows in"], n: int, m: int) -> Int64[Tensor, " in"]:
    """
    An order of the columns, `scores[:, order]`, of which N:M keeps at least as much as of the order they are in.

    Begins with the better of the given order and one that deals the columns out by their sums, largest first, so that
    large ones do not meet. Then, again and again, one column is taken out of every group and all are put back where
    they add most: with the others of a group fixed, a column adds `sum over rows of max(0, score - the n-th largest of
    the others)`, so the best way to put them back is a linear assignment (scipy), and the kept score never falls.
    Columns are taken out by a fixed random sequence.

    Args:
        scores: of weights; several layers, or stretches of one, whose columns must move together stand one below the
            other.
        n: kept of every group.
        m: columns of a group; divides their number.
    """
    size = scores.shape[1]
    identity = torch.arange(size, device=scores.device)
    dealt = _dealt(scores.sum(0), size // m)
    order = max(identity, dealt, key=lambda o: kept_score(scores[:, o], n, m))
    if size == m:
        return identity
    groups = order.view(-1, m).clone()
    generator = torch.Generator().manual_seed(0)
    total = float(scores.sum(dtype=torch.float64))
    lost = [total - kept_score(scores[:, groups.flatten()], n, m)]
    for _ in range(MOST_PASSES):
        slots = torch.randint(m, (len(groups),), generator=generator).to(groups.device)
        _reassign(scores, groups, slots, n)
        lost.append(total - kept_score(scores[:, groups.flatten()], n, m))
        if len(lost) > PATIENCE and lost[-1] >= (1 - ENOUGH) * lost[-1 - PATIENCE]:
            break
    return groups.flatten()


def _dealt(sums: Tensor, groups: int) -> Tensor:
    """Columns by falling sum, dealt out to groups forth and back; the groups one after another."""
    rounds = sums.argsort(descending=True, stable=True).view(-1, groups)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()


def _reassign(scores: Tensor, groups: Tensor, slots: Tensor, n: int) -> None:
    """Takes the column in `slots` out of every group and puts them back in the best way, in place."""
    from scipy.optimize import linear_sum_assignment  # half a second, which only this function needs

    every = torch.arange(len(groups), device=groups.device)
    taken = groups[every, slots]
    others = torch.ones_like(groups, dtype=torch.bool)
    others[every, slots] = False
    rest = groups[others].view(len(groups), -1)
    hurdle = scores[:, rest].topk(n, dim=-1).values[..., -1]
    columns = scores[:, taken]
    # max(0, a - b) = (|a - b| + a - b) / 2, whose sum over rows is a distance.
    distance = torch.cdist(columns.T.contiguous(), hurdle.T.contiguous(), p=1.0)
    gain = distance + columns.sum(0)[:, None] - hurdle.sum(0)
    _, places = linear_sum_assignment(gain.T.cpu().numpy(), maximize=True)
    groups[every, slots] = taken[torch.from_numpy(places).to(taken.device)]
