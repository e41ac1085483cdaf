"""Runs are compared as runs: a lucky seed is no better method."""

import math

import numpy as np
import pytest

from mlx_fd.evaluation.statistics import mean, paired_bootstrap
from support.draws import nightly
from support.scripted import script

several_runs = script("several_runs")
over_runs, RunValue = several_runs.over_runs, several_runs.RunValue
RUNS, EFFECT = 5, 0.02


def runs_of(difference):
    """What :func:`of_problems` gives of means, [RUNS, P] -> one value a run, in closed form."""
    errors = difference.std(axis=1, ddof=1) / math.sqrt(difference.shape[1])
    return [RunValue(*pair) for pair in zip(difference.mean(axis=1), errors, strict=True)]


def differences(draw, problems, effect):
    """Right minus right of two equal methods, [RUNS, problems], with luck of each run's own."""
    difficulty = draw.beta(2, 1, (RUNS, problems))
    one, other = (
        draw.random(difficulty.shape) < difficulty + draw.normal(0, effect, (RUNS, 1))
        for _ in range(2)
    )
    return one.astype(float) - other


def test_equal_methods_seldom_differ():
    draw = np.random.default_rng(0)
    significant = 0
    for _ in range(2000):
        estimate, p = over_runs(runs_of(differences(draw, 400, EFFECT)))
        significant += p < 0.05
        assert (p < 0.05) == (estimate.low > 0 or estimate.high < 0)
    assert 0.01 <= significant / 2000 <= 0.06


@nightly
def test_resampling_problems_alone_errs_more_than_twice_as_often():
    draw = np.random.default_rng(1)
    wrong = {"problems": 0, "runs": 0}
    for _ in range(100):
        difference = differences(draw, 400, 2 * EFFECT)
        flat = difference.ravel()
        wrong["problems"] += paired_bootstrap(flat, np.zeros(len(flat)))[1] < 0.05
        wrong["runs"] += over_runs(runs_of(difference))[1] < 0.05
    assert wrong["problems"] > 2 * wrong["runs"]
    assert wrong["problems"] >= 15


def test_an_interval_by_hand():
    runs = [RunValue(value, 0.0) for value in (1.0, 2.0, 3.0, math.nan)]
    estimate, p = over_runs(runs)
    # Student's t with 2 degrees of freedom: 4.302653 at 97.5 %.
    assert estimate.n == 3 and estimate.value == 2
    assert estimate.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert estimate.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    # Of two degrees of freedom the tail has a closed form: p = 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    assert p == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-9)


def test_runs_that_agree_by_luck_are_as_uncertain_as_their_problems():
    estimate, p = over_runs([RunValue(0.5, 0.3), RunValue(0.5, 0.4)])
    # Half of hypot(0.3, 0.4), times t of one degree of freedom.
    assert estimate.high - 0.5 == pytest.approx(0.25 * 12.706205, rel=1e-6)
    assert p == pytest.approx(1 - 2 * math.atan(2) / math.pi)


def test_a_runs_error_is_that_of_a_mean_for_a_mean():
    draw = np.random.default_rng(2)
    column = draw.random(40)
    run = several_runs.of_problems([column])
    assert run.value == pytest.approx(column.mean())
    assert run.error == pytest.approx(column.std(ddof=1) / math.sqrt(40))
    both = several_runs.of_problems([column, column / 2], lambda a, b: mean(a) - mean(b))
    assert (both.value, both.error) == (pytest.approx(run.value / 2), pytest.approx(run.error / 2))


def test_what_has_no_spread_has_no_test():
    alone, p = over_runs([RunValue(0.5, 0.1)])
    assert alone.value == 0.5 and math.isnan(alone.low) and math.isnan(p)
    same, p = over_runs([RunValue(0.0, 0.0)] * 2)
    assert same.value == 0 and math.isnan(same.low) and math.isnan(same.high) and math.isnan(p)
    assert math.isnan(over_runs([several_runs.of_problems([[]])])[0].value)
