import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlx_fd.evaluation.calibration import (
    brier,
    pearson,
    pr_auc,
    roc_auc,
    roc_auc_limits,
    spearman,
)
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.statistics import bootstrap

# Few values, so that there are ties.
_SCORES = st.sampled_from([-1.0, -0.5, 0.0, 0.1, 0.5, 1.0])
_ROWS = st.lists(st.tuples(_SCORES, st.booleans()), min_size=1, max_size=30)


def _columns(rows):
    return [a for a, _ in rows], [b for _, b in rows]


@given(_ROWS)
def test_roc_auc_counts_the_pairs_in_the_right_order(rows):
    scores, positive = _columns(rows)
    above = [p for p, is_positive in rows if is_positive]
    below = [n for n, is_positive in rows if not is_positive]
    if not above or not below:
        assert math.isnan(roc_auc(scores, positive))
        return
    pairs = [(p > n) + (p == n) / 2 for p, n in itertools.product(above, below)]
    assert roc_auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert roc_auc([-s for s in scores], positive) == pytest.approx(1 - sum(pairs) / len(pairs))


@given(_ROWS)
def test_pr_auc_is_the_mean_precision_at_the_positives(rows):
    scores, positive = _columns(rows)
    at = [
        sum(t for s, t in rows if s >= score) / sum(s >= score for s, _ in rows)
        for score, is_positive in rows
        if is_positive
    ]
    found = pr_auc(scores, positive)
    assert math.isnan(found) if not at else found == pytest.approx(sum(at) / len(at))


@given(_ROWS)
def test_both_are_scikit_learns(rows):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = _columns(rows)
    assume(any(positive) and not all(positive))
    assert roc_auc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores))
    assert pr_auc(scores, positive) == pytest.approx(
        metrics.average_precision_score(positive, scores)
    )


def test_by_hand():
    scores, positive = [0.9, 0.8, 0.7, 0.6, 0.5], [True, False, True, True, False]
    assert roc_auc(scores, positive) == pytest.approx(4 / 6)
    assert pr_auc(scores, positive) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert brier([1.0, 0.5, 0.0], [True, True, True]) == pytest.approx((0 + 0.25 + 1) / 3)
    assert pearson([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert spearman([1, 2, 3, 100], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


_NUMBERS = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(_NUMBERS, _NUMBERS), min_size=2, max_size=30))
def test_correlations_are_scipys(rows):
    stats = pytest.importorskip("scipy.stats")
    a, b = _columns(rows)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(pearson(a, b)) and math.isnan(spearman(a, b))
        return
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-9)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)
    assert pearson(a, a) == pytest.approx(1.0)


def test_missing_values_are_left_out():
    scores, positive = [0.9, math.nan, 0.1, 0.4], [1.0, 0.0, 0.0, math.nan]
    assert roc_auc(scores, positive) == 1.0
    assert pr_auc(scores, positive) == 1.0
    assert brier(scores, positive) == pytest.approx(0.01)
    for function in (roc_auc, pr_auc, brier, pearson, spearman):
        assert math.isnan(function([math.nan], [1.0]))
        assert math.isnan(function([], []))


def test_a_score_is_no_probability():
    with pytest.raises(ValueError, match="from 0 to 1"):
        brier([-0.5, 0.5], [True, False])


def test_they_have_intervals():
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.5
    found = bootstrap([positive + rng.normal(size=300), positive], roc_auc)
    truth = 0.5 * math.erfc(-1 / 2)  # P(N(1, 2) > 0)
    assert found.low < truth < found.high and found.n == 300


def test_a_perfect_order_of_few_is_no_certainty():
    """All resamples of a perfect order are perfect: the interval was [1, 1]."""
    found = Measure("auc", [3.0, 2, 1, 0], roc_auc, ([1.0, 1, 0, 0],)).estimate()
    assert found.value == found.high == 1.0 and 0.3 < found.low < 0.6
    # At the limit the observed area is 1.96 standard errors off (Hanley and McNeil's).
    low, p, n = found.low, 2, 2
    first, second = low / (2 - low), 2 * low**2 / (1 + low)
    mean = (p + n) / 2 - 1
    error = low * (1 - low) + mean * (first - low**2) + mean * (second - low**2)
    assert 1 - low == pytest.approx(1.959963984540054 * math.sqrt(error / (p * n)))
    wrong = Measure("auc", [0.0, 1, 2, 3], roc_auc, ([1.0, 1, 0, 0],)).estimate()
    assert (wrong.low, wrong.high) == pytest.approx((1 - found.high, 1 - found.low))
    assert math.isnan(Measure("rank", [1.0, 2, 3], spearman, ([1.0, 2, 3],)).estimate().low)


@pytest.mark.parametrize(("p", "n", "apart"), [(5, 5, 2.0), (6, 20, 1.0), (30, 30, 0.5)])
def test_newcombes_interval_holds_the_truth_nearly_always(p, n, apart):
    rng = np.random.default_rng(0)
    truth, labels = 0.5 * math.erfc(-apart / 2), np.r_[np.ones(p), np.zeros(n)]
    held = 0
    for _ in range(400):
        low, high = roc_auc_limits(rng.normal(size=p + n) + apart * labels, labels)
        held += low <= truth <= high
    assert held / 400 > 0.92
