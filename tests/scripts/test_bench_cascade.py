"""The cascades' committed rows and table belong together, and their statistics are right."""

import numpy as np
import pytest

from mlx_fd.evaluation.statistics import bootstrap, mean
from support.scripted import script


@pytest.fixture(scope="module")
def bench():
    return script("bench_cascade")


def row(seed, n=120):
    """A run whose scores order its answers."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 1, n)
    right = "".join(str(int(rng.random() < 0.3 + 0.65 * score)) for score in scores)
    return {
        "seed": seed,
        "episodes": 240,
        "calibrated_on": 500,
        "student": right,
        "expert": "1" * n,
        "expert_tokens": [20 + k % 5 for k in range(n)],
        "scores": scores.tolist(),
        "thresholds": {
            "accuracy 0.85": 0.4,
            "accuracy 0.9": 0.6,
            "risk 0.15": 0.9,
            "risk 0.1": None,
            "cost 0.3": 0.25,
        },
    }


def test_an_interval_has_the_spread_of_runs_and_of_problems(bench):
    rng = np.random.default_rng(0)
    column = rng.random(80)
    same = bench.over_both([[column]] * 4, mean)
    plain = bootstrap([column], mean)
    assert same.value == pytest.approx(plain.value)
    assert same.high - same.low == pytest.approx(plain.high - plain.low, rel=0.1)
    # Runs that differ by far more than their problems do.
    apart = bench.over_both([[column + 10 * k] for k in range(4)], mean)
    means = [np.mean(rng.integers(0, 4, 4) * 10) for _ in range(4000)]
    low, high = np.percentile(means, (2.5, 97.5))
    assert apart.high - apart.low == pytest.approx(high - low, rel=0.1)


def test_a_table_says_what_is_kept_and_what_a_lottery_needs(bench):
    rows = [row(seed) for seed in (2, 1, 3)]
    lines = bench.table(rows).splitlines()
    assert "seeds 1, 2, 3 after 240, 240, 240 episodes" in lines[0]
    assert float(lines[2].partition("passed on, +")[2].split()[0]) > 5
    [nothing] = [line for line in lines if line.startswith("| `--risk 0.1`")]
    assert "3 of 3, 3 pass everything on | 100.0 (100.0 to 100.0) | 100.0" in nothing
    [accuracy] = [line for line in lines if line.startswith("| `--accuracy 0.9`")]
    cells = [cell.split()[0] for cell in accuracy.strip("| ").split(" | ")[2:]]
    right, passed, lottery, saved = map(float, cells)
    truth = [
        np.mean([(s >= 0.6 and bit == "1") or s < 0.6 for s, bit in zip(*pair, strict=True)])
        for pair in ((one["scores"], one["student"]) for one in rows)
    ]
    assert right == pytest.approx(100 * np.mean(truth), abs=0.06)
    assert passed < lottery
    assert saved == pytest.approx(100 - passed, abs=1)


def test_the_committed_table_is_of_the_committed_rows(bench):
    assert bench.TABLE.read_text(encoding="utf-8") == bench.table(bench.read_rows())
