import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fd.evaluation.calibration import brier, roc_auc
from mlx_fd.evaluation.statistics import (
    RESAMPLES,
    bootstrap,
    holm,
    mcnemar,
    mean,
    paired_bootstrap,
    resample,
)


def test_interval_of_a_mean_is_the_normal_one():
    """For many rows the percentile interval is mean +- 1.96 standard errors."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    found = bootstrap([values], mean)
    error = values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert found.n == 2000


def test_a_difference_is_paired():
    before = np.random.default_rng(1).normal(0, 10, 200)
    found = bootstrap([before + 0.5, before], lambda a, b: mean(a) - mean(b))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_coverage_on_small_samples():
    """About 95 % of intervals hold the truth (a little less: the percentile bootstrap is short)."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = bootstrap([(rng.random(40) < 0.4).astype(float)], mean, seed=int(rng.integers(1e6)))
        held += found.low <= 0.4 <= found.high
    assert 178 <= held <= 198


def test_missing_values_and_no_rows():
    found = bootstrap([[1.0, math.nan, 3.0]], mean)
    assert found.value == 2.0 and 1.0 <= found.low <= found.high <= 3.0
    assert math.isnan(bootstrap([[math.nan, math.nan]], mean).low)
    # One row's resamples are itself, and no interval.
    one = bootstrap([[2.0]], mean)
    assert (one.value, one.n) == (2.0, 1) and math.isnan(one.low) and math.isnan(one.high)
    empty = bootstrap([[]], mean)
    assert empty.n == 0 and math.isnan(empty.value)


def test_the_seed_decides():
    values = list(range(10))
    assert bootstrap([values], mean, seed=1) == bootstrap([values], mean, seed=1)
    assert bootstrap([values], mean, seed=1) != bootstrap([values], mean, seed=2)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("missing", [False, True])
def test_many_samples_at_once_are_those_one_by_one(n, missing):
    """To the last bit: means of all samples at once, and of few rows each sample once."""
    rng = np.random.default_rng(n)
    values, truth = rng.random(n), (rng.random(n) < 0.5).astype(float)
    if missing:
        values[rng.integers(n)] = math.nan
    drawn = np.random.default_rng(3).integers(0, n, (RESAMPLES, n))
    for columns, statistic in (([values], mean), ([values, truth], roc_auc), ([truth], len)):
        one_by_one = [statistic(*(column[rows] for column in columns)) for rows in drawn]
        np.testing.assert_array_equal(resample(columns, statistic, seed=3), one_by_one)
    if not missing:
        other = rng.random(n)
        found, _ = paired_bootstrap(values, other, brier, [truth])
        both = [values, other, truth]
        plain = bootstrap(both, lambda a, b, true: brier(a, true) - brier(b, true))
        assert found.value == plain.value
        # Of fewer than six pairs the interval holds 0.
        if n > 5:
            assert (found.low, found.high) == (plain.low, plain.high)


# ------------------------------------------------------------------------------------ paired tests


def test_mcnemar_by_hand():
    """Nine problems that only a gets right, one that only b does: 2 (1 + 10) / 1,024."""
    a = [True] * 9 + [False] + [True, False] * 20
    b = [False] * 9 + [True] + [True, False] * 20
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(22 / 1024)
    assert mcnemar(a, a) == 1.0
    assert mcnemar([], []) == 1.0
    with pytest.raises(ValueError, match="argument 2"):
        mcnemar(a, b[1:])


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=300))
def test_mcnemar_is_scipys_binomial_test(rows):
    scipy_stats = pytest.importorskip("scipy.stats")
    only_a = sum(a and not b for a, b in rows)
    only_b = sum(b and not a for a, b in rows)
    p = mcnemar([a for a, _ in rows], [b for _, b in rows])
    assert 0 < p <= 1
    if only_a + only_b:
        assert p == pytest.approx(scipy_stats.binomtest(only_a, only_a + only_b).pvalue)


def test_paired_bootstrap_of_many_rows_is_the_normal_test():
    rng = np.random.default_rng(3)
    a = rng.normal(0, 10, 4000)
    for shift in (0.0, 0.03, 0.05):
        b = a + rng.normal(shift, 1, 4000)
        difference, p = paired_bootstrap(a, b)
        error = (a - b).std() / math.sqrt(len(a))
        z = (a - b).mean() / error
        assert difference.value == pytest.approx((a - b).mean())
        assert difference.low == pytest.approx(difference.value - 1.96 * error, abs=0.15 * error)
        assert p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.03)


def test_paired_bootstrap_is_rarely_wrong_where_nothing_differs():
    """About 5 % of true null hypotheses are below 0.05 (a little more: the bootstrap is short)."""
    rng = np.random.default_rng(4)
    below = sum(
        paired_bootstrap(rng.normal(size=50), rng.normal(size=50), seed=seed)[1] < 0.05
        for seed in range(80)
    )
    assert 1 <= below <= 11


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12))
def test_p_and_interval_of_a_paired_bootstrap_say_the_same(rows):
    a, b = (np.array(column, float) for column in zip(*rows, strict=True))
    difference, p = paired_bootstrap(a, b)
    back, same = paired_bootstrap(b, a)
    assert (back.value, back.low, back.high) == pytest.approx(
        (-difference.value, -difference.high, -difference.low)
    )
    assert p == same and 0 < p <= 1
    if p < 0.049:
        assert difference.low > 0 or difference.high < 0
    if difference.low > 0 or difference.high < 0:
        assert p < 0.055
    assert paired_bootstrap(a, a)[1] == 1.0


def test_few_pairs_that_differ_say_little():
    """Five that all go one way are as rare as five heads or tails, 2 / 32; six are 2 / 64."""
    for m, n in ((1, 1), (4, 4), (5, 100), (6, 6), (12, 12)):
        a = np.r_[np.ones(m), np.zeros(n - m)]
        difference, p = paired_bootstrap(a, np.zeros(n))
        assert p >= mcnemar(list(a == 1), [False] * n) == 2.0 ** (1 - m)
        assert (difference.low > 0) is (m >= 6)


def test_paired_bootstrap_of_a_statistic_with_a_shared_column():
    """A share among the wrong answers: the labels belong to the problems."""
    wrong = np.array([1.0, 1, 1, 1, 0, 0, 0, 0])
    a, b = np.array([1.0, 1, 1, 0, 0, 0, 0, 0]), np.array([0.0, 0, 1, 0, 1, 1, 1, 1])
    difference, _ = paired_bootstrap(a, b, lambda rows, w: mean(rows[w == 1]), [wrong])
    assert difference.value == pytest.approx(0.5) and difference.n == 8


def test_a_problem_that_one_system_has_no_value_for_is_no_pair():
    difference, _ = paired_bootstrap([1.0, math.nan, 3.0, 9.0], [0.0, 5.0, math.nan, 7.0])
    assert difference.value == pytest.approx(1.5) and difference.n == 2
    nothing, p = paired_bootstrap([math.nan], [1.0])
    assert nothing.n == 0 and math.isnan(p)
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap([1.0], [1.0, 2.0])


# ------------------------------------------------------------------------------------------- Holm


def test_holm_by_hand():
    """The textbook's four: 0.005 x 4, 0.01 x 3, then 0.03 x 2 and 0.04 no smaller than it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with_gap = holm([0.01, math.nan, 0.04])
    assert with_gap[0] == pytest.approx(0.02) and math.isnan(with_gap[1])
    assert with_gap[2] == pytest.approx(0.04)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(ps, alpha):
    """Go up from the smallest p while it is at most alpha over the tests that are left."""
    rejected = 0
    for p in sorted(ps):
        if p * (len(ps) - rejected) > alpha:
            break
        rejected += 1
    adjusted = holm(ps)
    assert sum(p <= alpha for p in adjusted) == rejected
    assert all(q >= p for p, q in zip(ps, adjusted, strict=True))
