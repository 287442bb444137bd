"""Computes how many weights to remove from every layer, so that the total is exact to one weight."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]
"""(sparsity, loss) of a layer at several sparsities; the allocated one lies between the least and the largest."""


def by_sensitivity(
    sensitivity: Mapping[str, float],
    sizes: Mapping[str, int],
    target: float,
    lowest: float = 0.0,
    highest: float = 0.95,
) -> dict[str, int]:
    """
    Allocates sparsities in inverse proportion to the cost of pruning a layer, within bounds.

    Equivalent to finding the factor c for which `min(highest, max(lowest, c / sensitivity))` of all layers removes
    `round(target * weights)` weights. (Scaling to the target and clipping afterwards misses it.)

    Args:
        sensitivity: the sensitivity of every layer, in any unit, e.g. the increase in perplexity when it alone is
            pruned. Values below a thousandth of the largest, also negative ones, are raised to that.
        sizes: the number of weights of every layer.
        target: the fraction of all weights to remove.
        lowest: the least sparsity of a layer.
        highest: the largest sparsity of a layer.

    Returns:
        The number of weights to remove from every layer.

    Raises:
        ValueError: the layers differ, a sensitivity is not finite, none is positive, or the bounds exclude the target.
    """
    _check(sensitivity, sizes, target)
    if not 0 <= lowest <= target <= highest < 1:
        raise ValueError(f"bounds [{lowest}, {highest}] must lie in [0, 1) and hold the target, {target}")
    largest = max(sensitivity.values())
    if largest <= 0:
        raise ValueError("no layer is sensitive: all sensitivities are zero or below")
    wish = {name: 1 / max(sensitivity[name], largest / 1000) for name in sizes}
    bounds = dict.fromkeys(sizes, (lowest, highest))
    return _solved(lambda c: {name: c * wish[name] for name in sizes}, sizes, bounds, target, 1 / min(wish.values()))


def by_outliers(
    ratios: Mapping[str, float], sizes: Mapping[str, int], target: float, reach: float = 0.08
) -> dict[str, int]:
    """
    Allocates density by the fraction of outliers: OWL (Yin et al. 2024, "Outlier Weighed Layerwise Sparsity").

    The ratios are scaled linearly to [0, 2 reach]. A layer's sparsity is a constant minus its scaled ratio, with one
    constant for all layers such that the total is met. So the sparsities of two layers differ by at most `2 reach`.

    Args:
        ratios: the fraction of outliers among the weights of every layer; in the paper the layers of a block share the
            fraction of the block.
        sizes: the number of weights of every layer.
        target: the fraction of all weights to remove.
        reach: the paper's lambda.

    Returns:
        The number of weights to remove from every layer.

    Raises:
        ValueError: the layers differ, a ratio is not finite, or the reach leaves [0, 1).
    """
    _check(ratios, sizes, target)
    check_reach(target, reach)
    least, most = min(ratios.values()), max(ratios.values())
    stretch = 2 * reach / (most - least) if most > least else 0.0
    bounds = dict.fromkeys(sizes, (target - 2 * reach, target + 2 * reach))
    return _solved(
        lambda c: {name: c - stretch * (ratios[name] - least) for name in sizes}, sizes, bounds, target, 1 + 2 * reach
    )


def by_losses(curves: Mapping[str, Curve], sizes: Mapping[str, int], target: float) -> dict[str, int]:
    """
    Allocates sparsities with the least sum of losses for the total: exact Lagrangian allocation.

    A layer's loss is interpolated linearly on the lower convex hull of its curve. Equivalent to the linear program over
    all points of the hulls. It is solved greedily: the next weight is removed where it costs least, until all slopes
    meet one Lagrange multiplier.

    Args:
        curves: the curve of every layer, all in the same unit of loss.
        sizes: the number of weights of every layer.
        target: the fraction of all weights to remove.

    Returns:
        The number of weights to remove from every layer.

    Raises:
        ValueError: the layers differ, a loss is not finite, or the curves do not reach the target.
    """
    _check({name: sum(loss for _, loss in curve) for name, curve in curves.items()}, sizes, target)
    hulls = {name: _lower_hull(curves[name]) for name in sizes}
    steps: list[tuple[float, str, float]] = []
    for name, hull in hulls.items():
        for (s0, loss0), (s1, loss1) in itertools.pairwise(hull):
            weights = (s1 - s0) * sizes[name]
            steps.append(((loss1 - loss0) / weights, name, weights))
    removed = {name: hull[0][0] * sizes[name] for name, hull in hulls.items()}
    left = round(target * sum(sizes.values())) - sum(removed.values())
    bounds = {name: (hull[0][0], hull[-1][0]) for name, hull in hulls.items()}
    room = sum((last - first) * sizes[name] for name, (first, last) in bounds.items())
    if not -0.5 <= left <= room + 0.5:
        raise ValueError(
            f"the loss curves do not reach {target:.2%} of all weights; measure losses at "
            f"{'lower' if left < 0 else 'higher'} sparsities"
        )
    for _, name, weights in sorted(steps, key=lambda step: step[0]):  # stable, and slopes rise along a hull
        taken = min(weights, left)
        removed[name] += taken
        left -= taken
    return _whole(removed, sizes, bounds, target)


def mix_of_groups(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], m: int, target: float
) -> dict[str, int]:
    """
    Chooses n of N:M for every layer, with the least sum of losses that removes at least the target.

    Equivalent to trying all mixes, to within 0.1 % of the least sum; solved as a mixed-integer program (scipy's HiGHS).

    Args:
        losses: the loss of every layer at each n, the weights kept of every m.
        sizes: the number of weights of every layer, a multiple of m.
        m: the size of a group.
        target: the fraction of all weights to remove.

    Returns:
        n of every layer.

    Raises:
        ValueError: the layers differ, a loss is not finite, or no mix removes that many weights.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # imported here because it takes half a second

    _check({name: sum(by_n.values()) for name, by_n in losses.items()}, sizes, target)
    choices = [(name, n) for name in sizes for n in losses[name]]
    cost = np.array([losses[name][n] for name, n in choices])
    gone = np.array([sizes[name] // m * (m - n) for name, n in choices], dtype=float)
    one_each = np.array([[float(name == layer) for name, _ in choices] for layer in sizes])
    wanted = math.ceil(round(target * sum(sizes.values()), 6))
    if sum(sizes[name] // m * (m - min(losses[name])) for name in sizes) < wanted:
        raise ValueError(f"no mix of these N:{m} patterns removes {target:.2%} of all weights")
    scale = max(float(cost.max()), np.finfo(float).tiny)
    solved = milp(
        cost / scale,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(gone / m, (wanted - 0.5) / m, np.inf)],
        options={"mip_rel_gap": 1e-3, "time_limit": 60},
    )
    assert solved.x is not None, solved.message
    return {name: n for (name, n), chosen in zip(choices, solved.x, strict=True) if chosen > 0.5}


def _solved(
    wishes: Callable[[float], Mapping[str, float]],
    sizes: Mapping[str, int],
    bounds: Mapping[str, tuple[float, float]],
    target: float,
    largest: float,
) -> dict[str, int]:
    """Returns the counts at the c in [0, largest] where `wishes`, which rise with c, meet the target within bounds."""
    wanted = round(target * sum(sizes.values()))

    def removed(c: float) -> dict[str, float]:
        return {
            name: min(max(wish, bounds[name][0]), bounds[name][1]) * sizes[name] for name, wish in wishes(c).items()
        }

    low, high = 0.0, largest
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(removed(middle).values()) < wanted else (low, middle)
    return _whole(removed(high), sizes, bounds, target)


def _whole(
    removed: Mapping[str, float], sizes: Mapping[str, int], bounds: Mapping[str, tuple[float, float]], target: float
) -> dict[str, int]:
    """Rounds `removed` to whole numbers within the bounds with the target's sum, by largest remainders."""
    wanted = round(target * sum(sizes.values()))
    counts = {name: math.floor(value) for name, value in removed.items()}
    by_remainder = sorted(removed, key=lambda name: counts[name] - removed[name])
    while (short := wanted - sum(counts.values())) != 0:
        step = 1 if short > 0 else -1
        before = short
        for name in by_remainder:
            limit = math.floor(bounds[name][1] * sizes[name]) if step > 0 else math.ceil(bounds[name][0] * sizes[name])
            if short and (limit - counts[name]) * step > 0:
                counts[name] += step
                short -= step
        assert short != before, "the bounds leave no room for the target"
    return counts


def _lower_hull(curve: Curve) -> list[tuple[float, float]]:
    """Returns the lower convex hull of a curve, from left to right."""
    least: dict[float, float] = {}
    for sparsity, loss in curve:
        least[sparsity] = min(least.get(sparsity, math.inf), loss)
    hull: list[tuple[float, float]] = []
    for x, y in sorted(least.items()):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def check_reach(target: float, reach: float) -> None:
    """Raises ValueError for a reach with which `by_outliers` could leave [0, 1)."""
    if not (reach >= 0 and target - 2 * reach >= 0 and target + 2 * reach < 1):
        raise ValueError(f"OWL: with a reach of {reach}, sparsities around {target} would leave [0, 1)")


def _check(values: Mapping[str, float], sizes: Mapping[str, int], target: float) -> None:
    if values.keys() != sizes.keys():
        differing = sorted(values.keys() ^ sizes.keys())
        raise ValueError(f"an allocation needs a value for every layer and for no other; {differing[0]} has none")
    if not sizes:
        raise ValueError("there are no layers to allocate sparsity to")
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"the value of {wrong[0]}, {values[wrong[0]]}, is not a finite number")
    if not 0 <= target < 1:
        raise ValueError(f"the target is the fraction of weights removed and must lie in [0, 1), got {target}")
