import math

import numpy as np
import pytest

from mlx_fd.evaluation.statistics import bootstrap, mean, mean_gain


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
    found = bootstrap([before + 0.5, before], mean_gain)
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
    empty = bootstrap([[]], mean)
    assert empty.n == 0 and math.isnan(empty.value)


def test_the_seed_decides():
    values = list(range(10))
    assert bootstrap([values], mean, seed=1) == bootstrap([values], mean, seed=1)
    assert bootstrap([values], mean, seed=1) != bootstrap([values], mean, seed=2)
