"""What a number over n problems is worth: intervals, paired tests, tables of tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mlx_fd.runs.records.parts import EstimateRow

Rows = NDArray[np.float64]
RESAMPLES = 2000
_ALPHA = 0.05


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval, over n problems."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> EstimateRow:
        """For JSON, which has no NaN: ``None`` where there is no number."""
        value, low, high = (
            found if math.isfinite(found) else None for found in (self.value, self.low, self.high)
        )
        return {"value": value, "low": low, "high": high, "n": self.n}


def resample(
    columns: Sequence[Sequence[float] | Rows], statistic: Callable[..., float], seed: int = 0
) -> Rows:
    """A statistic of 2,000 samples, each as many rows as there are, drawn with replacement.

    Args:
        columns: as for :func:`bootstrap`; at least one row.
        statistic: as for :func:`bootstrap`.
        seed: of the resampling; the same seed draws the same rows.
    """
    table = [np.asarray(column, dtype=np.float64) for column in columns]
    n = len(table[0])
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    if statistic is mean and not np.isnan(table[0]).any():
        means: Rows = table[0][drawn].mean(axis=1)
        return means
    if n**n >= RESAMPLES:
        return np.array([statistic(*(column[rows] for column in table)) for rows in drawn])
    # Of few rows the same samples come again and again.
    samples, which = np.unique(drawn, axis=0, return_inverse=True)
    values = [statistic(*(column[rows] for column in table)) for rows in samples]
    return np.array(values)[which.reshape(-1)]


def percentile_interval(value: float, draws: Rows, n: int) -> Estimate:
    """A statistic with the 2.5 and 97.5 percentiles of its resamples that are numbers."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Estimate(value, math.nan, math.nan, n)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Estimate(value, float(low), float(high), n)


def bootstrap(
    columns: Sequence[Sequence[float] | Rows], statistic: Callable[..., float], seed: int = 0
) -> Estimate:
    """The percentile bootstrap over problems (Efron, 1979), 2,000 resamples.

    Args:
        columns: one or more columns with a row per problem; NaN where a problem has no value. Rows
            are drawn whole, so a difference of two columns is a paired one.
        statistic: takes as many arrays as there are columns, and gives a number, or NaN where a
            resample has none.
        seed: of the resampling; the same seed draws the same rows.

    Returns:
        The statistic of all rows and the 2.5 and 97.5 percentiles over the resamples that have
        one; NaN where there are no rows. One row has no interval: its resamples are itself.
    """
    table = [np.asarray(column, dtype=np.float64) for column in columns]
    n = len(table[0])
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    if n == 1:
        return Estimate(float(statistic(*table)), math.nan, math.nan, 1)
    return percentile_interval(float(statistic(*table)), resample(table, statistic, seed), n)


def mean(column: Rows) -> float:
    """The mean of the values that are there; NaN where there are none."""
    numbers = column[~np.isnan(column)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def paired_bootstrap(
    a: Sequence[float] | Rows,
    b: Sequence[float] | Rows,
    statistic: Callable[..., float] = mean,
    shared: Sequence[Sequence[float] | Rows] = (),
    seed: int = 0,
) -> tuple[Estimate, float]:
    """Whether two systems differ on the same problems, for any statistic.

    The test is the interval turned round (Efron and Tibshirani, 1993, chapter 15): p is twice the
    share of resamples on the far side of 0, (1 + count) / (1 + 2,000) so that it is never 0. So p
    is below 0.05 just where the interval leaves 0 out, and no p is below 0.001.

    Few pairs look alike in all resamples, and tell nothing all the same. Where nothing differs,
    either side of a pair is as likely to be the larger one, so m pairs that differ all go one way
    with probability 2^(1 - m): p is no smaller, and the interval of fewer than six holds 0.

    Args:
        a: the first system's values, a row per problem; NaN where it has none.
        b: the second system's. A problem counts where both have a value.
        statistic: takes a column, and those of ``shared`` after it.
        shared: columns that belong to the problems, not to a system (such as the labels).
        seed: of the resampling; the same seed draws the same rows.

    Returns:
        ``statistic(a, *shared) - statistic(b, *shared)`` with its interval and the number of
        pairs, and the two-sided p; NaN where there is no pair.

    Raises:
        ValueError: the columns are not equally long.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (a, b, *shared)]
    if len({len(column) for column in columns}) > 1:
        raise ValueError("a paired test needs the same problems on both sides")
    paired = ~(np.isnan(columns[0]) | np.isnan(columns[1]))
    one, other, *rest = [column[paired] for column in columns]
    n = len(one)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0), math.nan
    # One seed draws the same rows of both.
    draws = resample([one, *rest], statistic, seed) - resample([other, *rest], statistic, seed)
    draws = draws[np.isfinite(draws)]
    value = float(statistic(one, *rest) - statistic(other, *rest))
    estimate = percentile_interval(value, draws, n)
    if not len(draws):
        return estimate, math.nan
    least = min((draws <= 0).sum(), (draws >= 0).sum())
    p = 2 * float(1 + least) / (1 + len(draws))
    chance = 2.0 ** (1 - int((one != other).sum()))
    if chance > _ALPHA:
        low, high = min(estimate.low, 0.0), max(estimate.high, 0.0)
        estimate = replace(estimate, low=low, high=high)
    return estimate, min(1.0, max(p, chance))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """McNemar's exact test of two systems' right and wrong on the same problems.

    Where there is no difference, of the m problems that just one system gets right, each is right
    by either with probability 1/2 (McNemar, 1947): the binomial tail says how rare so uneven a
    split is.

    Args:
        a: whether the first system is right, a row per problem.
        b: whether the second is.

    Returns:
        The two-sided p; 1 where they never differ.

    Raises:
        ValueError: the columns are not equally long.
    """
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    m, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(m, i) for i in range(least + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**m)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction (1979) of a table of p values, each of which was a chance to be wrong.

    The i-th smallest of m is multiplied by m - i + 1, and is no smaller than the one before it.
    The probability that any true null hypothesis has an adjusted p of at most alpha is at most
    alpha, however the tests depend on each other.

    Args:
        ps: the p values; NaN where there was no test, which counts as none.

    Returns:
        The adjusted ones, in the same order.
    """
    adjusted = [math.nan] * len(ps)
    order = sorted((index for index, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted
