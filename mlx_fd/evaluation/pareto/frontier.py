"""The mathematics of frontiers: points judged by several objectives, all of them to be made small.

Pure: numbers in, numbers out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def non_dominated(values: Values) -> NDArray[np.bool_]:
    """Which points no other point is as good as in all objectives and better than in one.

    Args:
        values: [points, objectives], to be made small.

    Returns:
        [points]; equal points stand or fall together.
    """
    no_worse = (values[:, None] <= values[None]).all(axis=2)
    better = (values[:, None] < values[None]).any(axis=2)
    dominated: NDArray[np.bool_] = np.any(no_worse & better, axis=0)
    return ~dominated


def hypervolume(values: Values, reference: Values) -> float:
    """The volume of all that some point dominates, up to a reference point.

    Exact, by the WFG algorithm (While, Bradstreet and Barone, 2012): the sum of what each point
    adds to those after it, an objective fewer at each level.

    Args:
        values: [points, objectives], to be made small; points that are not better than the
            reference in all objectives add nothing.
        reference: [objectives].
    """
    return _volume(values[(values < reference).all(axis=1)], reference)


def _volume(values: Values, reference: Values) -> float:
    if len(values) <= 1 or len(reference) == 1:
        return float(np.prod(reference - values.min(axis=0))) if len(values) else 0.0
    front = np.unique(values, axis=0)
    # From the greatest first objective to the least: what comes after a point is no worse there.
    front = front[non_dominated(front)][::-1]
    total = 0.0
    for index, point in enumerate(front):
        both = np.maximum(front[index + 1 :, 1:], point[1:])
        alone = float(np.prod(reference[1:] - point[1:])) - _volume(both, reference[1:])
        total += float(reference[0] - point[0]) * alone
    return total


def knee(cost: Values, rest: Values) -> int | None:
    """The point from which on more cost brings least, seen from both ends of a frontier.

    Every objective is normalised to [0, 1] over the points, and all but the cost are averaged. On
    the curve of that mean against the cost, the knee is the point furthest below the straight line
    from the cheapest to the dearest point (Das, 1999; with a sampled curve, Satopaa et al., 2011).

    Args:
        cost: [points] of a frontier.
        rest: [points, objectives], the other objectives, to be made small.

    Returns:
        The point's index, the cheaper one of two alike; ``None`` where no point is below the line:
        fewer than three costs, or a curve that does not bend.
    """
    if len(np.unique(cost)) < 3:
        return None
    x, y = _normalised(cost), _normalised(rest).mean(axis=1)
    begin, end = y[x == 0].min(), y[x == 1].min()
    below = begin + (end - begin) * x - y
    order = np.argsort(cost, kind="stable")
    best = int(order[np.argmax(below[order])])
    # Rounding leaves a point of the line itself a hair beside it.
    return best if below[best] > 1e-9 else None


def _normalised(values: Values) -> Values:
    """Each column from 0, its least, to 1, its greatest; 0 where all are the same."""
    span = np.ptp(values, axis=0)
    return np.asarray((values - values.min(axis=0)) / np.where(span > 0, span, 1.0))


def product_rule(cost: Values, loss: Values) -> int:
    """The published way to choose: the least product of cost and mean loss.

    Args:
        cost: [points] of a frontier.
        loss: [points], the mean of the losses as they are.

    Returns:
        The point's index, the first of two alike.
    """
    return int(np.argmin(cost * loss))
