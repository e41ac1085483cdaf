"""Intervals and tests where several runs are compared, each run with problems of its own.

A run differs from the next by its seed, its problems and the student that came of them, so the
spread of the runs' numbers holds all three (a balanced nested mixed model): Student's t over runs.
An interval that resamples problems alone takes a lucky seed for a better method. Of few runs the
spread may by luck be less than what the problems of each must bring; then that is taken instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mlx_fd.evaluation.statistics import Estimate, Rows, mean


@dataclass(frozen=True)
class RunValue:
    """A statistic of one run, and its standard error over the run's problems (by jackknife)."""

    value: float
    error: float


def of_problems(
    columns: Sequence[Sequence[float] | Rows], statistic: Callable[..., float] = mean
) -> RunValue:
    """A run's number.

    Args:
        columns: as for :func:`mlx_fd.evaluation.statistics.bootstrap`, a row per problem.
        statistic: takes as many arrays as there are columns; may be NaN.
    """
    table = [np.asarray(column, dtype=np.float64) for column in columns]
    n = len(table[0])
    if n == 0:
        return RunValue(math.nan, math.nan)
    without = np.array([statistic(*(np.delete(c, row) for c in table)) for row in range(n)])
    without = without[np.isfinite(without)]
    spread = math.sqrt((n - 1) * float(without.var())) if len(without) else 0.0
    return RunValue(float(statistic(*table)), spread)


def over_runs(runs: Sequence[RunValue]) -> tuple[Estimate, float]:
    """The mean of runs' numbers, its 95 % interval, and the p of its being 0.

    Args:
        runs: one number each (for a comparison: the difference of two runs on the same problems);
            those that are NaN do not count. Runs share no problems.

    Returns:
        The mean with its interval and the number of runs, and the two-sided p. Both are NaN for
        fewer than two runs, and where there is no spread at all: not one problem differs, of which
        neither says how sure that is.
    """
    counted = [run for run in runs if not math.isnan(run.value)]
    values = np.array([run.value for run in counted])
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()) if n else math.nan, math.nan, math.nan, n), math.nan
    centre = float(values.mean())
    error = max(float(stats.sem(values)), math.hypot(*(run.error for run in counted)) / n)
    return _students_t(centre, error, n)


def _students_t(centre: float, error: float, n: int) -> tuple[Estimate, float]:
    """A mean over n runs with its 95 % interval and p, which are NaN where it has no error."""
    if not error > 0:
        return Estimate(centre, math.nan, math.nan, n), math.nan
    low, high = stats.t.interval(0.95, n - 1, centre, error)
    p = 2 * stats.t.sf(abs(centre) / error, n - 1)
    return Estimate(centre, float(low), float(high), n), float(p)


def over_runs_and_problems(
    runs: Sequence[Sequence[Rows]], statistic: Callable[..., float] = mean
) -> tuple[Estimate, float]:
    """The same of runs that share their problems (crossed with them): mean, interval, p.

    The runs' spread says nothing of the problems, which are as lucky for one run as for the next.
    So their jackknife over all runs together is added to it. What is of one run and one problem
    alone is in both: the interval is a little too wide.

    Args:
        runs: the columns of each run, a row per problem; problem k is the same in all.
        statistic: of a run's columns.
    """

    def of_all(*columns: Rows) -> float:
        return float(np.mean([statistic(*run) for run in np.split(np.array(columns), len(runs))]))

    values = [float(statistic(*run)) for run in runs]
    problems = of_problems([column for run in runs for column in run], of_all)
    apart, n = float(stats.sem(values)) if len(values) > 1 else math.nan, len(values)
    return _students_t(problems.value, math.hypot(apart, problems.error), n)
