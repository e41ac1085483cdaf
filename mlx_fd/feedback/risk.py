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
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

# Probability that a bound holds.
LEVEL = 0.95
# The fixed sequence of thresholds. How many there are costs nothing.
THRESHOLDS = (
    *(0.9999, 0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.935, 0.92, 0.9),
    *(0.88, 0.86, 0.83, 0.8, 0.78, 0.76, 0.74, 0.72, 0.7, 0.68, 0.66, 0.64, 0.62, 0.6),
    *(0.58, 0.56, 0.54, 0.52, 0.5, 0.47, 0.44, 0.41, 0.38, 0.35, 0.32, 0.29, 0.26, 0.23, 0.2),
    *(0.17, 0.14, 0.12, 0.1, 0.08, 0.065, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01, 0.005, 0.0),
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

    def covers(self, confidence: float | None) -> bool:
        """Whether a verdict of this confidence is kept; without a confidence it never is."""
        return (
            self.threshold is not None and confidence is not None and confidence >= self.threshold
        )


NO_TRUST = Trust()


@lru_cache(maxsize=1 << 14)
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
    if max_disagreement >= 1:
        return 0
    error = (1 - level) / _STARTS
    return max(1, math.ceil(math.log(error) / math.log1p(-max_disagreement) - 1e-9))


def _holds(k: int, n: int, max_disagreement: float, error: float) -> bool:
    """Whether at most k of n have no more than this probability under a larger share."""
    return max_disagreement >= 1 or binomial_tail(k, n, max_disagreement) <= error


def set_threshold(
    confidences: Sequence[float],
    agreements: Sequence[bool],
    max_disagreement: float,
) -> Trust:
    """The lowest threshold at which the share of kept verdicts that differ surely holds.

    Args:
        confidences: of the audited verdicts, in [0, 1].
        agreements: for each, whether the verdicts were the same.
        max_disagreement: the largest share of kept verdicts that may differ, in (0, 1]; it holds
            with probability :data:`LEVEL`.

    Returns:
        The threshold with its coverage of ``confidences`` and its bound; :data:`NO_TRUST` where no
        threshold passes.

    Raises:
        ValueError: the columns are not equally long.
    """
    verdicts = list(zip(map(_reached, confidences), agreements, strict=True))
    seen, differ = _totals(verdicts)
    lowest = _lowest(seen, differ, len(confidences), max_disagreement, LEVEL)
    if lowest is None:
        return NO_TRUST
    n, k = seen[lowest], differ[lowest]
    return Trust(THRESHOLDS[lowest], n / max(len(confidences), 1), n, k, upper_bound(k, n))


def _reached(confidence: float) -> int:
    """The index of the strictest threshold that a confidence reaches; their number: of none."""
    return bisect_left(THRESHOLDS, -confidence, key=lambda threshold: -threshold)


def _totals(verdicts: Sequence[tuple[int, bool]]) -> tuple[list[int], list[int]]:
    """For each threshold the number of verdicts that reach it, and how many of them differ."""
    seen, differ = ([0] * (len(THRESHOLDS) + 1) for _ in range(2))
    for index, agreed in verdicts:
        seen[index] += 1
        differ[index] += not agreed
    return list(accumulate(seen[:-1])), list(accumulate(differ[:-1]))


def _lowest(
    seen: Sequence[int], differ: Sequence[int], total: int, max_disagreement: float, level: float
) -> int | None:
    """The index of the lowest threshold that the sequence of tests comes to.

    Args:
        seen: for each threshold, how many audited verdicts count.
        differ: how many of them differ.
        total: of all audited verdicts.
        max_disagreement: the share that is tested.
        level: probability with which it holds.
    """
    enough = fewest_audits(max_disagreement, level)
    starts = [enough, (enough + total) / 2]
    found, error = None, 0.0
    for index, (n, k) in enumerate(zip(seen, differ, strict=True)):
        while starts and n >= starts[0]:
            starts = starts[1:]
            error += (1 - level) / _STARTS
        if error and _holds(k, n, max_disagreement, error):
            found = index
        else:
            error = 0.0
    return found


# ------------------------------------------------------------------------ while something learns

# How often in a run a threshold may be lowered.
LOOKS = 8
# Probability with which each of them is right.
LOOK_LEVEL = 1 - (1 - LEVEL) / LOOKS


def last_look(batches: int) -> int:
    """Batches done at the last look that any batch follows; 0: there is none.

    Args:
        batches: of the run; a look can be after each of them.
    """
    due = [_looks_due(done / batches) for done in range(batches)]
    return max((done for done in range(1, batches) if due[done] > due[done - 1]), default=0)


def _looks_due(progress: float) -> int:
    return int(progress * LOOKS + 1e-9)


@dataclass(frozen=True)
class RunningTrust:
    """Trust in a model that changes while verdicts come in.

    Whoever tests again and again will once be lucky, and trust that came by luck lasts, since fewer
    verdicts are audited under it. So a threshold is *granted* only at one of :data:`LOOKS` looks,
    spread over the run, each with its part of 1 - :data:`LEVEL` (Bonferroni): where risks do not
    change, no threshold above the bound is granted in the whole run, with probability ``LEVEL``. A
    look sees the last ``window`` audited verdicts, so that what is long ago is forgotten. A
    threshold is *kept* as long as the last ``window`` verdicts that reach it show the bound by
    themselves; where they do not any more, nothing is trusted until another look.

    Attributes:
        verdicts: audited verdicts that still count, the newest last: the index of the strictest of
            :data:`THRESHOLDS` that each reaches, and whether it agreed.
        looks: looks so far.
        trust: what holds now; its coverage is of the last ``window`` audited verdicts.
    """

    verdicts: tuple[tuple[int, bool], ...] = ()
    looks: int = 0
    trust: Trust = NO_TRUST

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunningTrust:
        """What :func:`dataclasses.asdict` gave, also after a trip through JSON text."""
        verdicts = tuple((index, agreed) for index, agreed in value["verdicts"])
        return cls(**{**value, "verdicts": verdicts, "trust": Trust(**value["trust"])})


def audit(state: RunningTrust, confidence: float | None, agreed: bool) -> RunningTrust:
    """Take note of a verdict that the expert was asked about, too.

    Args:
        state: before this call; it is left as it is.
        confidence: in [0, 1]; ``None`` where there is none, which says nothing.
        agreed: whether the verdicts were the same.
    """
    if confidence is None:
        return state
    verdict = (_reached(confidence), agreed)
    return replace(state, verdicts=(*state.verdicts, verdict))


def look(
    state: RunningTrust, progress: float, max_disagreement: float, window: int
) -> RunningTrust:
    """Set the threshold by the verdicts so far.

    Args:
        state: before this call; it is left as it is.
        progress: share of the run that is done, in [0, 1]. A look, at which the threshold can be
            lowered, is due whenever another of :data:`LOOKS` equal parts is done.
        max_disagreement: the largest share of kept verdicts that may differ; 0: none are kept.
        window: the most verdicts that a threshold rests on.
    """
    verdicts, looks, before = _counting(state.verdicts, window), state.looks, state.trust.threshold
    due = _looks_due(progress)
    state = replace(state, verdicts=verdicts, looks=max(due, state.looks), trust=NO_TRUST)
    if not max_disagreement:
        return state
    lately = verdicts[-window:]
    granted = [] if before is None else [THRESHOLDS.index(before)]
    if due > looks:
        shown = _lowest(*_totals(lately), len(lately), max_disagreement, LOOK_LEVEL)
        granted += [] if shown is None else [shown]
    # The lowest first: where older verdicts speak against it, the one before it may still hold.
    for place in sorted(granted, reverse=True):
        n, k = _count(verdicts, place, window)
        if _holds(k, n, max_disagreement, 1 - LEVEL):
            coverage = _count(lately, place, window)[0] / max(len(lately), 1)
            return replace(state, trust=Trust(THRESHOLDS[place], coverage, n, k, upper_bound(k, n)))
    return state


def _count(verdicts: Sequence[tuple[int, bool]], place: int, window: int) -> tuple[int, int]:
    """Of the last ``window`` verdicts that reach a threshold, their number and how many differ."""
    agreements = [agreed for index, agreed in verdicts if index <= place][-window:]
    return len(agreements), len(agreements) - sum(agreements)


def _counting(verdicts: tuple[tuple[int, bool], ...], window: int) -> tuple[tuple[int, bool], ...]:
    """The verdicts that some threshold rests on.

    Of all thresholds that a verdict reaches, the strictest has the fewest newer verdicts.
    """
    newer = [0] * (len(THRESHOLDS) + 1)
    kept = []
    for index, agreed in reversed(verdicts):
        if sum(newer[: index + 1]) < window:
            newer[index] += 1
            kept.append((index, agreed))
    return tuple(reversed(kept))
