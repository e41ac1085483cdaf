"""Where to stop distilling: what each stopping threshold leads to, and how to choose one of them.

Pure: numbers in, numbers out; no MLX, no files. :func:`replay` asks the EMA gate where it would
have stopped a run that was never stopped. The others judge points by several objectives at once,
all of them to be made small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_fd import gate
from mlx_fd.config import GateOptions

Values = NDArray[np.float64]

# Thresholds closer than this are one: nobody would write so many digits into a configuration.
RESOLUTION = 1e-6


@dataclass(frozen=True)
class Look:
    """A look at the probe set.

    Attributes:
        batch: batches done by then.
        losses: mean losses on the probe set.
        cost: what was spent since the look before, as the run told its gate: optimiser steps.
    """

    batch: int
    losses: dict[str, float]
    cost: float


@dataclass(frozen=True)
class Outcome:
    """What the thresholds from ``low`` up to ``high`` all lead to.

    Attributes:
        stop_threshold: one of them, with as few digits as tell it from the others.
        low: the smallest.
        high: the next outcome's smallest; 1 for the last.
        stopped_after_batch: batches done when the student froze; ``None``: it never did.
    """

    stop_threshold: float
    low: float
    high: float
    stopped_after_batch: int | None


def replay(first: gate.Losses, looks: Sequence[Look], options: GateOptions) -> list[Outcome]:
    """Where the EMA gate would have stopped a run, for every threshold from 0 to 1.

    Up to its first freeze the gate remembers the same whatever ``stop_threshold`` is, so one pass
    over the looks will do: each has a threshold below which it freezes the student
    (:func:`mlx_fd.gate.stops_below`), and a threshold stops at the first look whose own is above
    it. That is exact, not a grid.

    Args:
        first: losses on the probe set before the first update, by the name of each loss in use.
        looks: the looks after it, in order, of a run whose student learned from every sample.
        options: the gate's options; ``gate`` is taken for ``"ema"``, ``stop_threshold`` is varied.

    Returns:
        The distinct outcomes, by rising threshold and so by later stops. The last is that of
        threshold 1.
    """
    # The strictest threshold: only plateaus of all losses freeze it, and then every other has.
    options = dataclasses.replace(options, gate="ema", stop_threshold=1.0)
    state = gate.initial_state(options, list(first))
    state, _ = gate.observe_probe(state, first, options, cost=0.0)
    outcomes = []
    reached = 0.0
    for look in looks:
        state, _ = gate.observe_probe(state, look.losses, options, cost=look.cost)
        below = 1.0 if state.frozen else gate.stops_below(state, options)
        if below - reached >= RESOLUTION:
            outcomes.append(Outcome(_between(reached, below), reached, below, look.batch))
        if state.frozen:
            return outcomes
        reached = max(reached, below)
    return [*outcomes, Outcome(1.0, reached, 1.0, None)]


def _between(low: float, high: float) -> float:
    """The middle of an interval, rounded as far as it stays inside."""
    middle = (low + high) / 2
    rounded = (round(middle, digits) for digits in range(2, 17))
    return next((value for value in rounded if low < value < high), middle)


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
    for place, point in enumerate(front):
        both = np.maximum(front[place + 1 :, 1:], point[1:])
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
    return (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)


def product_rule(cost: Values, loss: Values) -> int:
    """The published way to choose: the least product of cost and mean loss.

    Args:
        cost: [points] of a frontier.
        loss: [points], the mean of the losses as they are.

    Returns:
        The point's index, the first of two alike.
    """
    return int(np.argmin(cost * loss))
