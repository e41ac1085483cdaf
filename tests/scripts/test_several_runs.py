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


def crossed(draw, runs, problems, spread):
    """Right or not, [runs, problems], on problems that all runs share; their true mean is 0.5."""
    of_run, of_problem = draw.normal(0, spread, (runs, 1)), draw.normal(0, 1, problems)
    return (of_run + of_problem + draw.normal(0, 1, (runs, problems)) > 0).astype(float)


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("runs", [4, 5])
def test_an_interval_over_runs_on_the_same_problems_covers(runs, spread):
    draw, covered, n = np.random.default_rng(0), 0, 100
    for _ in range(n):
        columns = [[one] for one in crossed(draw, runs, 60, spread)]
        estimate, p = several_runs.over_runs_and_problems(columns)
        covered += estimate.low <= 0.5 <= estimate.high
        assert (p < 0.05) == (estimate.low > 0 or estimate.high < 0)
    # With 95 % one of a hundred times fewer than 90 of 100 would cover.
    assert covered / n >= 0.9


def test_runs_that_are_alike_leave_the_spread_of_their_problems():
    column = np.random.default_rng(0).random(80)
    estimate, _ = several_runs.over_runs_and_problems([[column]] * 4)
    error = column.std(ddof=1) / math.sqrt(80)
    assert estimate.value == pytest.approx(column.mean())
    # 3.182446 is Student's t with 3 degrees of freedom at 97.5 %.
    assert estimate.high - estimate.value == pytest.approx(3.182446 * error, rel=1e-5)
    one, p = several_runs.over_runs_and_problems([[column]])
    assert math.isnan(one.low) and math.isnan(p)
    same, p = several_runs.over_runs_and_problems([[np.ones(5)]] * 3)
    assert same.value == 1 and math.isnan(same.low) and math.isnan(p)
