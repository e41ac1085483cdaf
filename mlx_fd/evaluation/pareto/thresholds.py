"""Which stopping thresholds there are in a run that was never stopped, and where each stops it.

Pure: :func:`replay` asks the EMA gate, and reads no files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_fd.config import GateOptions
from mlx_fd.feedback import gate

# Thresholds closer than this are one: nobody would write so many digits into a configuration.
RESOLUTION = 1e-6


@dataclass(frozen=True)
class Look:
    """A look at the probe set.

    Attributes:
        batch: batches done by then.
        losses: mean losses on the probe set.
        cost: what was spent since the look before, in the gate's unit: tokens of the expert's
            feedbacks.
    """

    batch: int
    losses: dict[str, float]
    cost: float


@dataclass(frozen=True)
class Stop:
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


def replay(first: gate.Losses, looks: Sequence[Look], options: GateOptions) -> list[Stop]:
    """Where the EMA gate would have stopped a run, for every threshold from 0 to 1.

    Up to its first freeze the gate remembers the same whatever ``stop_threshold`` is, so one pass
    over the looks will do: each has a threshold below which it freezes the student
    (:func:`mlx_fd.feedback.gate.stops_below`), and a threshold stops at the first look whose own is
    above it. That is exact, not a grid.

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
            outcomes.append(Stop(_between(reached, below), reached, below, look.batch))
        if state.frozen:
            return outcomes
        reached = max(reached, below)
    return [*outcomes, Stop(1.0, reached, 1.0, None)]


def _between(low: float, high: float) -> float:
    """The middle of an interval, rounded as far as it stays inside."""
    middle = (low + high) / 2
    rounded = (round(middle, digits) for digits in range(2, 17))
    return next((value for value in rounded if low < value < high), middle)
