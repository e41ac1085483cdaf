"""The phase schedule of the losses' weights: correctness first, reasoning later.

At progress t in [0, 1] with r = clip((t - begin) / (end - begin), 0, 1), a loss counts::

    1 - (1 - floor) r        the losses of correctness
    floor + (1 - floor) r    the losses of reasoning
    1                        all others

divided by the sum over the enabled losses. First the student learns to arrive at the right answer;
then the weight moves, linearly, to how the expert gets there. No loss ever counts nothing, so none
is forgotten. The published code of the feedback method has no schedule; this one is ours.

Pure, like :mod:`mlx_fd.feedback.gate`, whose weights it can be combined with: the gate says which
loss lags, the schedule which one has its turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlx_fd.feedback.loss_terms import LOSSES


def _of_phase(phase: str) -> tuple[str, ...]:
    return tuple(name for name, loss in LOSSES.items() if loss.phase == phase)


@dataclass(frozen=True)
class PhaseSchedule:
    """Which losses come first, which later, and when the weight moves.

    Attributes:
        correctness: losses of the first phase; by default those that say so of themselves.
        reasoning: losses of the last phase, likewise.
        begin: progress at which the weight begins to move.
        end: progress at which it has moved; where both are the same, it jumps there.
        floor: what a loss counts out of its phase, against 1 in it; in (0, 1].

    Raises:
        ValueError: not 0 <= begin <= end <= 1, a floor out of range, or a loss in both phases.
    """

    correctness: tuple[str, ...] = field(default_factory=lambda: _of_phase("correctness"))
    reasoning: tuple[str, ...] = field(default_factory=lambda: _of_phase("reasoning"))
    begin: float = 0.25
    end: float = 0.75
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(f"need 0 <= begin <= end <= 1, not {self.begin} and {self.end}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must be in (0, 1], not {self.floor}")
        if both := set(self.correctness) & set(self.reasoning):
            raise ValueError(f"in both phases: {', '.join(sorted(both))}")


def phase_weights(
    names: Sequence[str], progress: float, schedule: PhaseSchedule
) -> dict[str, float]:
    """What each loss counts at this point of the run; sum 1.

    Args:
        names: the enabled losses, at least one.
        progress: share of the run that is done, in [0, 1].
        schedule: the schedule.

    Raises:
        ValueError: progress out of range, or no losses.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], not {progress}")
    if progress >= schedule.end:
        moved = 1.0
    else:
        span = schedule.end - schedule.begin
        moved = max(progress - schedule.begin, 0.0) / span if span else 0.0
    first = 1 - (1 - schedule.floor) * moved
    later = schedule.floor + (1 - schedule.floor) * moved
    return _normalised(
        {
            name: first
            if name in schedule.correctness
            else later
            if name in schedule.reasoning
            else 1.0
            for name in names
        }
    )


def combined(*weightings: Mapping[str, float]) -> dict[str, float]:
    """The product of several weightings of the same losses; sum 1.

    Args:
        *weightings: for instance :func:`mlx_fd.feedback.gate.weights` and :func:`phase_weights`.

    Raises:
        ValueError: they name different losses, or nothing has any weight.
    """
    names = list(weightings[0])
    if any(set(weights) != set(names) for weights in weightings):
        raise ValueError(f"different losses are weighted: {[sorted(w) for w in weightings]}")
    return _normalised({name: math.prod(w[name] for w in weightings) for name in names})


def _normalised(shares: Mapping[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    if not total > 0:
        raise ValueError(f"no loss has any weight: {dict(shares)}")
    return {name: share / total for name, share in shares.items()}
