"""How many of the best-scored answers can be kept, so that few enough of them are surely wrong.

Answers are ranked by their score, the best first. Let R(t) = P(wrong | score >= t), which does not
fall as t does, and k the wrong ones among the first m answers. All m are looked at, and the largest
m is kept of which k is at most b(m). From the first m on whose threshold has R(t) > risk, the count
k has the law of, or more than, a random walk W of Bernoulli(risk) steps: the answers down to that
threshold are independent draws of such a share, and each further one is wrong with at least that
probability. So with b(m) the largest k with P(Bin(m, risk) <= k) <= e, the promise is broken with
probability at most P(W_m <= b(m) for any m up to n), and e is set so that this is 1 - ``LEVEL``.
That probability is computed, not bounded: one look after another, as for the boundaries of
sequential trials (Armitage, McPherson and Rowe, 1969; a constant e: Pocock, 1977).

A fixed sequence of thresholds (:mod:`mlx_fd.feedback.risk`) has to pass every one of them down from
the strictest, where answers are few; this has to pass one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mlx_fd.feedback.risk import LEVEL, binomial_tail

# Levels that are tried at once, and how often between the two best of them.
_LEVELS, _ROUNDS = 24, 3
# Times as many problems, beyond which more of them are no advice.
_MOST_TIMES = 10
# Shares of fewer answers say little of other problems.
_FEWEST = 20


@dataclass(frozen=True)
class Kept:
    """The best-scored answers that can be kept.

    Attributes:
        threshold: the lowest of their scores.
        wrong: how many of them are wrong.
        of: how many they are.
        level: e, at which each count was tested.
    """

    threshold: float
    wrong: int
    of: int
    level: float


def keep(scores: Sequence[float], right: Sequence[bool], risk: float) -> Kept | None:
    """The most answers that can be kept; ``None``: none can.

    Args:
        scores: of the answers, the higher the better.
        right: whether each is right.
        risk: the largest share of the kept answers that may be wrong, in (0, 1).
    """
    ends = _ends(scores, right)
    if not ends:
        return None
    level = level_of(len(scores), risk)
    for threshold, wrong, count in reversed(ends):
        if _so_few(wrong, count, risk, level):
            return Kept(threshold, wrong, count, level)
    return None


def _so_few(wrong: int, count: int, risk: float, level: float) -> bool:
    """Whether at most so many wrong ones are less likely than a level below a half."""
    # No count from the mean on has a tail below a half: most need no sum.
    return wrong < risk * count and binomial_tail(wrong, count, risk) <= level


def _ends(scores: Sequence[float], right: Sequence[bool]) -> list[tuple[float, int, int]]:
    """Each score, the best first, with how many answers reach it and how many of them are wrong."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    found: list[tuple[float, int, int]] = []
    wrong = 0
    for count, place in enumerate(order, 1):
        wrong += not right[place]
        if found and found[-1][0] == scores[place]:
            found.pop()
        found.append((scores[place], wrong, count))
    return found


@lru_cache(maxsize=1 << 10)
def level_of(n: int, risk: float) -> float:
    """The level at which each of the first n counts can be tested, so that all keep the promise.

    Args:
        n: number of answers, at least 1.
        risk: in (0, 1).
    """
    error = 1 - LEVEL
    low, high = 0.0, error
    for _ in range(_ROUNDS):
        levels = np.linspace(low, high, _LEVELS + 2)[1:-1]
        crossed = _crossed(n, risk, levels)
        fits = int((crossed <= error).sum())  # crossed rises with the level
        low, high = ([low, *levels, high][place] for place in (fits, fits + 1))
    return float(low)


def _crossed(n: int, risk: float, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(W_m <= b(m) for any m <= n) of each level's b, by dynamic programming over m.

    Args:
        n: number of steps.
        risk: probability of each.
        levels: [levels], rising.
    """
    # No count above the mean of all has a tail below a half.
    counts = np.arange(int(n * risk) + 2)
    law = np.zeros(len(counts))  # of W_m
    law[0] = 1.0
    inside = np.repeat(law[None], len(levels), axis=0)  # of those that have not crossed
    total = np.zeros(len(levels))
    for _ in range(n):
        law = _stepped(law, risk)
        inside = _stepped(inside, risk)
        under = np.searchsorted(np.cumsum(law), levels, side="right")
        if under[-1]:
            crossing = counts[: under[-1]] < under[:, None]
            part = inside[:, : under[-1]]
            total += (part * crossing).sum(axis=1)
            part[crossing] = 0.0
    return total


def _stepped(law: NDArray[np.float64], risk: float) -> NDArray[np.float64]:
    """The law of a count [.., counts] after one more step."""
    after = law * (1 - risk)
    after[..., 1:] += law[..., :-1] * risk
    return after


# ------------------------------------------------------------------- where a promise is too much


def least_risk(scores: Sequence[float], right: Sequence[bool], above: float) -> float | None:
    """The least risk, in whole per cent, that these answers allow to promise.

    Args:
        scores: of the answers.
        right: whether each is right.
        above: a risk that they do not allow.
    """
    per_cent = range(int(above * 100) + 1, 100)
    return next((k / 100 for k in per_cent if keep(scores, right, k / 100) is not None), None)


def problems_needed(scores: Sequence[float], right: Sequence[bool], risk: float) -> int | None:
    """About how many problems allow a promise, if the others come out as these did.

    Returns:
        A multiple of their number; ``None``: up to ten times as many do not.
    """
    n = len(scores)
    ends = [(wrong, of) for _, wrong, of in _ends(scores, right) if of >= _FEWEST]

    def do(times: int, level: float) -> bool:
        return any(_so_few(wrong * times, of * times, risk, level) for wrong, of in ends)

    now = level_of(n, risk)
    # The level falls as problems become more; that of many takes a while.
    possible = (times for times in range(2, _MOST_TIMES + 1) if do(times, now))
    return next((n * times for times in possible if do(times, level_of(n * times, risk))), None)
