import math

import numpy as np
import pytest

from mlx_fd.evaluation.reliability import judging, reliability
from support.reported import alone, episode

sklearn = pytest.importorskip("sklearn.metrics")


def scored(number, expert, head, written):
    return episode(
        number,
        expert_feedback={"text": "", "written_score": expert},
        student_feedback={"text": "", "head_score": head, "written_score": written},
    )


def test_both_scores_are_held_against_the_experts_verdict_in_the_second_half():
    rng = np.random.default_rng(0)
    experts = rng.choice([-0.8, 1.0], 200)
    heads = np.clip(experts * 0.3 + rng.normal(0, 0.4, 200), -0.99, 0.99)
    written = np.where(rng.random(200) < 0.8, experts, -experts)
    rows = [scored(n, experts[n], heads[n], written[n]) for n in range(200)]
    # What the expert was not asked, or gave no score for, counts for nothing.
    rows += [alone(200), scored(201, None, 0.9, 1.0)]
    found = judging(rows)
    truth = experts[100:] > 0
    for name, scores in (("head", heads[100:]), ("written", written[100:])):
        p = np.round((1 + scores) / 2, 12)  # of -0.8 a hair less than 0.1
        assert found[name]["n"] == 100
        assert found[name]["auc"] == pytest.approx(sklearn.roc_auc_score(truth, p), abs=1e-4)
        assert found[name]["brier"] == pytest.approx(sklearn.brier_score_loss(truth, p), abs=1e-4)
        for measure, far in (("auc", 0.2), ("brier", 0.15)):
            low, high = found[name][f"{measure}_interval"]
            assert low < found[name][measure] < high and high - low < far
        assert sum(bin["n"] for bin in found[name]["curve"]) == 100
        for bin in found[name]["curve"]:
            inside = (p >= bin["low"]) & (p < bin["high"] + (bin["high"] == 1))
            assert bin["n"] == inside.sum()
            assert bin["right"] == pytest.approx(truth[inside].mean(), abs=1e-4)
            assert bin["probability"] == pytest.approx(p[inside].mean(), abs=1e-4)


def test_where_nothing_is_known_nothing_is_said():
    assert judging([]) is None and judging([alone(0)]) is None
    one = reliability([1.0, None], [True, True])
    assert one["n"] == 1 and one["auc"] is None and one["brier"] == 0.0
    assert one["curve"] == [{"low": 0.9, "high": 1.0, "n": 1, "probability": 1.0, "right": 1.0}]
    # Scores with one digit, as they are written: 0.1 is of the bin from 0.1 on.
    places = [round(place / 10, 1) for place in range(10)]
    curve = reliability([round(2 * p - 1, 1) for p in places], [True] * 10)["curve"]
    assert [(bin["low"], bin["n"]) for bin in curve] == [(place, 1) for place in places]
    nothing = reliability([None], [False])
    numbers = ("brier", "brier_interval", "auc", "auc_interval")
    assert nothing == {"n": 0, **dict.fromkeys(numbers), "curve": []}
    # Of one answer nothing says how far the number may be off.
    assert one["auc_interval"] is None and one["brier_interval"] is None
    # Nor do the resamples of a perfect order, all of which are perfect.
    low, high = reliability([0.9, 0.5, -0.5, -0.9], [True, True, False, False])["auc_interval"]
    assert low < 0.6 and high == 1.0


def test_the_interval_of_an_auc_is_as_wide_as_theory_has_it():
    rng = np.random.default_rng(1)
    truth = rng.random(400) < 0.5
    scores = np.clip(truth * 0.2 + rng.normal(0, 0.3, 400), -1, 1)
    found = reliability(list(scores), list(truth))
    # Hanley and McNeil (1982), equation 2.
    a, p, n = found["auc"], truth.sum(), (~truth).sum()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (p - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (p * n)
    low, high = found["auc_interval"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.15)
