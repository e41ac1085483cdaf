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
        p = (1 + scores) / 2
        assert found[name]["n"] == 100
        assert found[name]["auc"] == pytest.approx(sklearn.roc_auc_score(truth, p), abs=1e-4)
        assert found[name]["brier"] == pytest.approx(sklearn.brier_score_loss(truth, p), abs=1e-4)
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
    nothing = reliability([None], [False])
    assert nothing == {"n": 0, "brier": None, "auc": None, "curve": []}
    assert not math.isnan(nothing["n"])
