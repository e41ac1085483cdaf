"""Risk control: how confident must a model be so that few enough of its verdicts are wrong?

The user states the largest share of kept verdicts that may differ from those of the one who is
not asked (``max_disagreement``); a *threshold* on a confidence is set from audited verdicts,
those where both are known, so that the share holds with probability ``LEVEL``. Confidences are in
[0, 1].

For a threshold t, let R(t) = P(the verdicts differ | confidence >= t). Of n audited verdicts at
least that confident, k differ. The hypothesis R(t) > ``max_disagreement`` is rejected where a
binomial of n draws has at most k with probability at most 1 - ``LEVEL``; just there the upper bound
of Clopper and Pearson (Biometrika 26, 1934) is at most ``max_disagreement``. Thresholds are tested
in a fixed sequence, from the strictest on: one that is rejected hands its share of 1 - ``LEVEL`` on
to the next, so that testing many costs nothing (learn then test: Angelopoulos et al., arXiv
2110.01052). The sequence has two starts, at the first threshold with enough verdicts and where half
of the others are in, with half of 1 - ``LEVEL`` each (the fallback procedure: Wiens, Pharmaceutical
Statistics 2, 2003); otherwise a few unlucky verdicts among the most confident would end it.

Two things are exact only where a more confident verdict is no more often wrong than a less
confident one: that the starts depend on how many verdicts there are, and that verdicts may have
been audited the less often the more confident they were. Both then err on the safe side.

Pure Python, no arrays: the gate (:mod:`mlx_fd.feedback.gate`) and whatever else passes hard cases
on use the same functions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

# Probability that a bound holds.
LEVEL = 0.95
# The fixed sequence of thresholds; finer where confidences pile up.
THRESHOLDS = (
    *(0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9),
    *(0.87, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
)
# Starts of the sequence of tests.
_STARTS = 2
# Halvings of the interval in which a bound is looked for: to the last bit of a float near 1e-4.
_HALVINGS = 60


@dataclass(frozen=True)
class Trust:
    """What may be kept without asking, and what is known of it.

    Attributes:
        threshold: verdicts at least this confident are kept; ``None``: none are.
        coverage: the share of the confidences that are at least that high.
        audited: audited verdicts at least that confident.
        disagreed: those of them that differed.
        bound: with probability ``LEVEL``, the share that differs is at most this; 1 where nothing
            is known.
    """

    threshold: float | None = None
    coverage: float = 0.0
    audited: int = 0
    disagreed: int = 0
    bound: float = 1.0

    @property
    def risk(self) -> float | None:
        """The share of the audited ones that differed; ``None`` where there are none."""
        return self.disagreed / self.audited if self.audited else None

    def covers(self, confidence: float | None) -> bool:
        """Whether a verdict of this confidence is kept; without a confidence it never is."""
        return (
            self.threshold is not None and confidence is not None and confidence >= self.threshold
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and ``None``."""
        return asdict(self)


NO_TRUST = Trust()


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial of n draws with probability p, by exact summation.

    Args:
        k: in [0, n].
        n: number of draws, at least 1.
        p: in [0, 1].
    """
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    # In logarithms: the single factors leave the range of floats where n is in the thousands.
    up, down = math.log(p), math.log1p(-p)
    whole = math.lgamma(n + 1)
    terms = (
        math.exp(whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * up + (n - i) * down)
        for i in range(k + 1)
    )
    return min(1.0, math.fsum(terms))


def upper_bound(k: int, n: int, level: float = LEVEL) -> float:
    """Clopper and Pearson's exact one-sided upper bound of a share, k of n seen.

    Args:
        k: in [0, n].
        n: number of draws.
        level: probability that the bound holds, in (0, 1).

    Returns:
        The p at which at most k of n have probability 1 - ``level``; 1 for k = n, also for n = 0.
    """
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if binomial_tail(k, n, middle) > 1 - level:
            low = middle
        else:
            high = middle
    return high


def fewest_audits(max_disagreement: float, level: float = LEVEL) -> int:
    """The fewest audited verdicts that can set a threshold; none of them may differ then.

    Args:
        max_disagreement: in (0, 1].
        level: probability that the bound holds, in (0, 1).
    """
    n = 1
    while not _holds(0, n, max_disagreement, (1 - level) / _STARTS):
        n += 1
    return n


def _holds(k: int, n: int, max_disagreement: float, error: float) -> bool:
    """Whether at most k of n have no more than this probability under a larger share."""
    return max_disagreement >= 1 or binomial_tail(k, n, max_disagreement) <= error


def set_threshold(
    confidences: Sequence[float],
    agreements: Sequence[bool],
    max_disagreement: float,
    level: float = LEVEL,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Trust:
    """The lowest threshold at which the share of kept verdicts that differ surely holds.

    Args:
        confidences: of the audited verdicts, in [0, 1].
        agreements: for each, whether the verdicts were the same.
        max_disagreement: the largest share of kept verdicts that may differ, in (0, 1].
        level: probability with which that holds, in (0, 1).
        thresholds: the fixed sequence, descending. It must not be chosen by these audits.

    Returns:
        The threshold with its coverage of ``confidences`` and its bound; :data:`NO_TRUST` where no
        threshold passes.

    Raises:
        ValueError: the columns are not equally long.
    """
    counts = [0] * len(thresholds)
    differ = [0] * len(thresholds)
    ascending = sorted(thresholds)
    for confidence, agreed in zip(confidences, agreements, strict=True):
        # The strictest threshold that the confidence reaches, as an index into the sequence.
        index = len(thresholds) - bisect_right(ascending, confidence)
        if index < len(thresholds):
            counts[index] += 1
            differ[index] += not agreed
    enough = fewest_audits(max_disagreement, level)
    starts = [enough, (enough + len(confidences)) / 2]
    found, error = NO_TRUST, 0.0
    for threshold, n, k in zip(thresholds, accumulate(counts), accumulate(differ), strict=True):
        while starts and n >= starts[0]:
            starts = starts[1:]
            error += (1 - level) / _STARTS
        if not error:
            continue
        if _holds(k, n, max_disagreement, error):
            found = Trust(threshold, n / len(confidences), n, k, upper_bound(k, n, level))
        else:
            error = 0.0
    return found
