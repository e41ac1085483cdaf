"""What a score means: the share of right answers at it, which never falls as the score rises."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.runs.records.cascade import CascadeStepRow

# A share of fewer answers says little.
_FEWEST = 20


def steps(found: Sequence[Outcome]) -> list[CascadeStepRow]:
    """Isotonic regression of right answers on scores, by pooling adjacent violators.

    Answers of neighbouring scores are first put into bins of at least 20, equal scores together;
    neighbouring bins of which the higher is right less often become one (Ayer et al., 1955).

    Args:
        found: at least one.

    Returns:
        Steps from the lowest score on: each begins at a score, and has its share and its number of
        answers.
    """
    ordered = sorted((one.score, one.student) for one in found)
    bins: list[list[float]] = []  # first score, right, count
    for place, (score, is_right) in enumerate(ordered):
        same = place and score == ordered[place - 1][0]
        left = len(ordered) - place
        if not bins or (bins[-1][2] >= _FEWEST and not same and left >= _FEWEST):
            bins.append([score, 0.0, 0.0])
        bins[-1][1] += is_right
        bins[-1][2] += 1
    pooled: list[list[float]] = []
    for one in bins:
        pooled.append([*one])
        while len(pooled) > 1 and pooled[-1][1] * pooled[-2][2] <= pooled[-2][1] * pooled[-1][2]:
            _, right, count = pooled.pop()
            pooled[-1][1] += right
            pooled[-1][2] += count
    return [
        {"score": score, "right": right / count, "n": int(count)} for score, right, count in pooled
    ]


def confidence(found: Sequence[CascadeStepRow], score: float) -> float:
    """The share of right answers at a score."""
    place = bisect_right([step["score"] for step in found], score) - 1
    return found[max(place, 0)]["right"]
