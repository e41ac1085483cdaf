"""How well scores tell right answers from wrong ones, and go along with the truth.

Each function takes two columns with a row per answer and gives one number, NaN where there is none,
so it can be handed to :func:`mlx_fd.evaluation.statistics.bootstrap` as it is. Rows where either
value is missing (NaN) are left out; none of these numbers needs a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlx_fd.evaluation.statistics import Rows

_Z = 1.959963984540054
Column = Sequence[float] | Sequence[bool] | Rows


def _known(*columns: Column) -> list[Rows]:
    table = np.array([np.asarray(column, dtype=np.float64) for column in columns])
    return list(table[:, ~np.isnan(table).any(axis=0)])


def _ranks(values: Rows) -> Rows:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[inverse]


def roc_auc(scores: Column, positive: Column) -> float:
    """The probability that a positive scores above a negative, a tie counting half.

    This is the area under the ROC curve (Hanley and McNeil, 1982), computed from ranks.

    Args:
        scores: higher: more likely positive. Only their order counts.
        positive: for each score, whether it is one of a positive.

    Returns:
        In [0, 1], 0.5 for scores that say nothing; NaN without positives or without negatives.
    """
    values, truth = _known(scores, positive)
    p, n = float((truth != 0).sum()), float((truth == 0).sum())
    if not p * n:
        return math.nan
    return float((_ranks(values)[truth != 0].sum() - p * (p + 1) / 2) / (p * n))


def roc_auc_limits(scores: Column, positive: Column) -> tuple[float, float]:
    """The 95 % interval of :func:`roc_auc` that also holds where it is 0 or 1 (Newcombe, 2006).

    It has the areas that differ from the observed one by at most 1.96 of their own standard errors,
    which are those of Hanley and McNeil (1982) with the mean of both numbers in both numerators;
    Newcombe's method 5 (Statistics in Medicine 25, 559-573).

    Args:
        scores: as for :func:`roc_auc`.
        positive: likewise.

    Returns:
        Both limits; NaN without positives or without negatives.
    """
    values, truth = _known(scores, positive)
    p, n = float((truth != 0).sum()), float((truth == 0).sum())
    seen = roc_auc(values, truth)
    if math.isnan(seen):
        return math.nan, math.nan
    others = (p + n) / 2 - 1

    def is_near(area: float) -> bool:
        factor = 1 + others * ((1 - area) / (2 - area) + area / (1 + area))
        return (area - seen) ** 2 <= _Z**2 * area * (1 - area) * factor / (p * n)

    def limit(far: float) -> float:
        if far == seen:
            return seen
        near = seen
        for _ in range(60):
            middle = (near + far) / 2
            near, far = (middle, far) if is_near(middle) else (near, middle)
        return near

    return limit(0.0), limit(1.0)


def pr_auc(scores: Column, positive: Column) -> float:
    """Average precision: the mean, over the positives, of the precision at each one's score.

    It is the area under the precision-recall curve as a step function, which interpolates nothing
    and so is not too optimistic (Davis and Goadrich, 2006). Scores that say nothing get the share
    of positives.

    Args:
        scores: higher: more likely positive. Equal ones are taken together.
        positive: for each score, whether it is one of a positive.

    Returns:
        In (0, 1]; NaN without positives.
    """
    values, truth = _known(scores, positive)
    if not (truth != 0).any():
        return math.nan
    descending = np.argsort(-values, kind="stable")
    values, truth = values[descending], (truth != 0)[descending]
    last_of_equals = np.append(np.diff(values) != 0, True)
    hits = np.cumsum(truth)[last_of_equals]
    taken = np.flatnonzero(last_of_equals) + 1
    return float(np.sum(np.diff(hits, prepend=0) * hits / taken) / hits[-1])


def brier(probabilities: Column, positive: Column) -> float:
    """The mean squared distance of probabilities from what happened (Brier, 1950).

    Args:
        probabilities: in [0, 1]; a score s in [-1, 1] is read as (1 + s) / 2.
        positive: for each score, whether it is one of a positive.

    Returns:
        0 is best, and 0.25 is what a constant 0.5 gets; NaN without rows.

    Raises:
        ValueError: a probability is not in [0, 1].
    """
    values, truth = _known(probabilities, positive)
    if ((values < 0) | (values > 1)).any():
        raise ValueError("the Brier score is of probabilities, from 0 to 1")
    return float(np.mean((values - (truth != 0)) ** 2)) if len(values) else math.nan


def pearson(a: Column, b: Column) -> float:
    """Pearson's correlation; NaN below two rows, or where a column is constant."""
    x, y = _known(a, b)
    # A test of equality, because a constant's deviations need not round to 0.
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    # Norms first: squares of small numbers would underflow.
    return float(np.clip(x / np.linalg.norm(x) @ (y / np.linalg.norm(y)), -1, 1))


def spearman(a: Column, b: Column) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing one."""
    x, y = _known(a, b)
    return pearson(_ranks(x), _ranks(y))
