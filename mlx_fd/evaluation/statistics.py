"""Bootstrap intervals: what a number over n problems is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval, over n problems."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: ``None`` where there is no number."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


def bootstrap(
    columns: Sequence[Sequence[float] | Rows], statistic: Callable[..., float], seed: int = 0
) -> Estimate:
    """The percentile bootstrap over problems (Efron, 1979), 2,000 resamples.

    Args:
        columns: one or more columns with a row per problem; NaN where a problem has no value. Rows
            are drawn whole, so a difference of two columns is a paired one.
        statistic: takes as many arrays as there are columns, and gives a number, or NaN where a
            resample has none.
        seed: of the resampling.

    Returns:
        The statistic of all rows and the 2.5 and 97.5 percentiles over the resamples that have
        one; NaN where there are no rows.
    """
    table = [np.asarray(column, dtype=np.float64) for column in columns]
    n = len(table[0])
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    draws = np.array(
        [
            statistic(*(column[rows] for column in table))
            for rows in rng.integers(0, n, (RESAMPLES, n))
        ]
    )
    value = float(statistic(*table))
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Estimate(value, float("nan"), float("nan"), n)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Estimate(value, float(low), float(high), n)


def mean(column: Rows) -> float:
    """The mean of the values that are there; NaN where there are none."""
    known = column[~np.isnan(column)]
    return float(known.mean()) if len(known) else float("nan")


def mean_gain(after: Rows, before: Rows) -> float:
    """The difference of two columns' means."""
    return mean(after) - mean(before)
