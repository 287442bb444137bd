"""How many weights every layer loses, so that all layers together lose a share: exact to one weight."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]
"""(sparsity, loss) of a layer at several sparsities, between the first and the last of which it will lie."""


def by_sensitivity(
    sensitivity: Mapping[str, float],
    sizes: Mapping[str, int],
    target: float,
    lowest: float = 0.0,
    highest: float = 0.95,
) -> dict[str, int]:
    """
    Sparsities in inverse proportion to what pruning a layer costs, within bounds.

    Equivalent to finding the factor c for which `min(highest, max(lowest, c / sensitivity))` of all layers removes
    `round(target * weights)` weights. (Scaling to the target and clipping afterwards misses it.)

    Args:
        sensitivity: of every layer, in any unit, e.g. the increase in perplexity when it alone is pruned. Of layers
            whose pruning helped, or hardly cost anything, a thousandth of the largest is taken.
        sizes: weights of every layer.
        target: fraction removed of all layers together.
        lowest: sparsity that every layer has at least.
        highest: and at most.

    Returns:
        How many weights every layer loses.

    Raises:
        ValueError: the layers differ, a sensitivity is not finite or all are zero, or the bounds exclude the target.
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
    Density in proportion to the share of outliers: OWL (Yin et al. 2024, "Outlier Weighed Layerwise Sparsity").

    The ratios are stretched to [0, 2 reach]; a layer's sparsity is the target less that, shifted by what all have in
    common so that the total is met. So layers lie within twice the reach of each other.

    Args:
        ratios: outliers of every layer, as a share of its weights; layers of a block have the block's in the paper.
        sizes: weights of every layer.
        target: fraction removed of all layers together.
        reach: the paper's lambda.

    Returns:
        How many weights every layer loses.

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
    The least sum of losses that the total allows: exact Lagrangian allocation.

    A layer's loss is read off the lower convex hull of its curve, straight between two points. Equivalent to the
    linear program over all points of the hulls; it is solved by removing weights where the next one costs least, which
    is where all slopes meet the same Lagrange multiplier.

    Args:
        curves: of every layer, in one unit of loss.
        sizes: weights of every layer.
        target: fraction removed of all layers together.

    Returns:
        How many weights every layer loses.

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
    for _, name, weights in sorted(steps, key=lambda step: step[0]):  # stable, and the slopes of a hull rise
        taken = min(weights, left)
        removed[name] += taken
        left -= taken
    return _whole(removed, sizes, bounds, target)


def mix_of_groups(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], m: int, target: float
) -> dict[str, int]:
    """
    How many of every m weights each layer keeps: the least sum of losses with at least the target removed.

    Equivalent to trying all mixes; a mixed-integer program (scipy's HiGHS), to within 0.1 % of the least sum.

    Args:
        losses: of every layer, by n, the weights kept of every m.
        sizes: weights of every layer, multiples of m.
        m: size of a group.
        target: fraction removed of all layers together.

    Returns:
        n of every layer.

    Raises:
        ValueError: the layers differ, a loss is not finite, or no mix removes as much.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, which only this function needs

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
    """The counts at the c in [0, largest] where wishes, which rise with c, meet the target within their bounds."""
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
    """Whole numbers near `removed` and within the bounds, whose sum is the target's: largest remainders go up."""
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
    """The lower convex hull of a curve, from left to right."""
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
    """Raises ValueError where `by_outliers` could leave [0, 1)."""
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
