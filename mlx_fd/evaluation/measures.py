"""A measure over problems: its estimate, and two systems' difference in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_fd.evaluation.calibration import roc_auc, roc_auc_limits
from mlx_fd.evaluation.processbench import f1, wilson_limits_of_f1
from mlx_fd.evaluation.statistics import Estimate, bootstrap, mcnemar, mean, paired_bootstrap
from mlx_fd.runs.records.evaluation import DifferenceRow
from mlx_fd.runs.summary import wilson

# Of values whose resamples are all alike.
_LIMITS: dict[Callable[..., float], Callable[..., tuple[float, float]]] = {
    f1: wilson_limits_of_f1,
    roc_auc: roc_auc_limits,
}
# A correlation of 1 is a hair less in some resamples.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Measure:
    """What one system got in one measure.

    Attributes:
        name: of the measure.
        values: one for each problem; NaN where it has none.
        statistic: makes one number of them, and of the columns of ``shared`` after them.
        shared: columns that belong to the problems, not to the system.
        compared: whether systems are compared in it.
    """

    name: str
    values: Sequence[float]
    statistic: Callable[..., float] = mean
    shared: tuple[Sequence[float], ...] = ()
    compared: bool = False

    @property
    def is_share(self) -> bool:
        """Whether it is a share of problems: a mean of zeros and ones."""
        numbers = [value for value in self.values if not math.isnan(value)]
        return self.statistic is mean and set(numbers) <= {0.0, 1.0}

    @property
    def is_of_unit(self) -> bool:
        """Whether it is a mean of values from 0 to 1."""
        numbers = (value for value in self.values if not math.isnan(value))
        return self.statistic is mean and all(0 <= value <= 1 for value in numbers)

    def estimate(self) -> Estimate:
        """Its value with n and interval: Wilson's for a share, else the percentile bootstrap.

        Resamples that are all alike say nothing of how far a value may be off. Then an F1 has that
        of the Wilson limits of its two shares, an area under the ROC curve Newcombe's interval, and
        another statistic has none.
        """
        columns = np.array([self.values, *self.shared], dtype=np.float64)
        columns = columns[:, ~np.isnan(columns[0])]
        n = columns.shape[1]
        if not self.is_share or not n:
            found = bootstrap(list(columns), self.statistic)
            if found.high - found.low < _ROUNDING:
                limits = _LIMITS.get(self.statistic)
                low, high = limits(*columns) if limits else (math.nan, math.nan)
                return replace(found, low=low, high=high)
            return found
        right = int(columns[0].sum())
        return Estimate(right / n, *wilson(right, n), n)


@dataclass(frozen=True)
class Known:
    """A number of all texts together, whose maker has its interval.

    Attributes:
        name: of the measure.
        value: with its interval and n.
    """

    name: str
    value: Estimate

    def estimate(self) -> Estimate:
        """The value."""
        return self.value


def difference(first: Measure, second: Measure) -> tuple[Estimate, float]:
    """Two systems' difference in a measure: its paired bootstrap.

    Resamples that are all alike say nothing of how far a difference may be off. Of values in [0, 1]
    that differ on no problem, the shares of problems where either is the larger one are 0 of n
    each, and the difference lies between the upper Wilson limit of one and that of the other. Of
    shares where each problem is right by one system alone, it is at least twice the lower limit of
    n of n, less 1. Otherwise there is no interval.

    Returns:
        ``first - second`` with its interval and the number of pairs, and the two-sided p.
    """
    found, p = paired_bootstrap(first.values, second.values, first.statistic, first.shared)
    none = replace(found, low=math.nan, high=math.nan)
    if found.n == 1:
        return none, p
    if not found.high - found.low < _ROUNDING:
        return found, p
    least, most = wilson(found.n, found.n)[0], wilson(0, found.n)[1]
    if first.is_of_unit and second.is_of_unit and found.value == 0:
        return replace(found, low=-most, high=most), p
    if first.is_share and second.is_share:
        limit = 2 * least - 1
        low, high = (limit, 1.0) if found.value > 0 else (-1.0, -limit)
        return replace(found, low=low, high=high), p
    return none, p


def compare(first: Measure, second: Measure) -> DifferenceRow:
    """The difference of two systems on the same problems.

    Returns:
        ``difference`` (with interval and n), ``test`` (McNemar's exact one for shares, else the
        paired bootstrap) and ``p``.
    """
    found, p = difference(first, second)
    test = "paired bootstrap"
    if first.is_share and second.is_share and found.n:
        pairs = np.array([first.values, second.values])
        left, right = pairs[:, ~np.isnan(pairs).any(axis=0)]
        test, p = "mcnemar", mcnemar(list(left == 1), list(right == 1))
    return {
        "difference": found.to_json(),
        "test": test,
        "p": None if math.isnan(p) else p,
    }
