"""What several samples of one problem are worth: Pass@k, Maj@k, and the pick by a score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

WARM = 0.7
"""The temperature of several answers where nothing says how warm they are."""


def pass_at_k(right: int, n: int, k: int) -> float:
    """The probability that at least one of k samples is right.

    Of n samples ``right`` are; the estimate 1 - C(n - right, k) / C(n, k) is the share of the
    subsets of k that hold a right one, and unbiased, where 1 - (1 - right/n)^k is not (Chen et al.,
    2021, arXiv 2107.03374).

    Raises:
        ValueError: not 0 <= right <= n, or not 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"Pass@{k} of {right} right samples among {n} is not defined")
    return float(1 - Fraction(math.comb(n - right, k), math.comb(n, k)))


def maj_at_k(finals: Sequence[str | None], right: Callable[[str], bool]) -> float:
    """The probability that the vote of k samples is right (self-consistency, arXiv 2203.11171).

    Args:
        finals: the final answer of each sample; those that could not be read (``None``) do not
            vote.
        right: whether a final answer is right.

    Returns:
        1 where a right one has the most votes, 1/m where it shares them with m - 1 wrong ones (a
        tie is broken by lot), else 0; 0 too where no sample votes.

    Raises:
        ValueError: there is no sample.
    """
    if not finals:
        raise ValueError("Maj@k needs a sample")
    votes = Counter(final for final in finals if final is not None)
    most = max(votes.values(), default=0)
    winners = [final for final, count in votes.items() if count == most]
    return sum(map(right, winners)) / len(winners) if winners else 0.0


def best_of(scores: Sequence[float | None], right: Sequence[bool]) -> float:
    """The probability that the sample with the best score is right.

    Args:
        scores: of each sample; one without (``None``) is taken only where none has a score.
        right: whether each is right.

    Returns:
        The share of right ones among those with the best score: a tie is broken by lot.

    Raises:
        ValueError: there is no sample, or they are not equally many.
    """
    best = max((score for score in scores if score is not None), default=None)
    taken = [ok for score, ok in zip(scores, right, strict=True) if score == best]
    if not taken:
        raise ValueError("the best of no samples is not defined")
    return sum(taken) / len(taken)
