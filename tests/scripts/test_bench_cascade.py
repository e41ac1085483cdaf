"""The cascades' committed rows and table belong together, and their statistics are right."""

import numpy as np
import pytest

from mlx_fd.evaluation.cascade import choice
from mlx_fd.evaluation.cascade.scores import ANSWER
from support.scripted import script


@pytest.fixture(scope="module")
def bench():
    return script("bench_cascade")


def part(rng, n):
    scores = rng.uniform(0, 1, n)
    right = "".join(str(int(rng.random() < 0.3 + 0.7 * score)) for score in scores)
    tokens = [20 + k % 5 for k in range(n)]
    columns = {"student": right, "expert": "1" * n, "expert_tokens": tokens}
    return {**columns, "scores": scores.round(5).tolist()}


def row(seed, pair="tiny", n=120):
    """A run whose scores order its answers."""
    rng = np.random.default_rng(seed)
    return {
        "pair": pair,
        "seed": seed,
        "episodes": 240,
        "calibration": part(rng, 500),
        "held_out": part(rng, n),
    }


def test_a_run_of_another_length_is_not_in_the_mean(bench):
    rows = [row(seed) for seed in (2, 1, 3)]
    longer = {**row(4), "episodes": 1024}
    assert bench.table([longer, *rows]) == bench.table(rows)


def test_a_table_says_what_is_kept_and_what_a_lottery_needs(bench):
    rows = [row(seed) for seed in (2, 1, 3)]
    lines = bench.table([*rows, row(4, "tiny-hard")]).splitlines()
    assert "`tiny`, seeds 1, 2, 3 after 240 episodes each" in lines[0]
    assert [line for line in lines if "`tiny-hard`, seeds 4 after 240 episodes each" in line]
    assert float(lines[2].partition("passed on, +")[2].split()[0]) > 5
    [accuracy] = [line for line in lines if line.startswith("| `--accuracy 0.9`")]
    cells = [cell.split()[0] for cell in accuracy.strip("| ").split(" | ")[2:]]
    right, passed, lottery, saved = map(float, cells)
    truth = []
    for one in rows:
        calibration = bench.outcomes_of(one, "calibration")
        least = choice.choose(calibration, ANSWER, "accuracy", 0.9)["threshold"]
        pairs = zip(one["held_out"]["scores"], one["held_out"]["student"], strict=True)
        truth.append(np.mean([score < least or bit == "1" for score, bit in pairs]))
    assert right == pytest.approx(100 * np.mean(truth), abs=0.06)
    assert passed < lottery
    assert saved == pytest.approx(100 - passed, abs=1)
    [nothing] = [line for line in lines if line.startswith("| `--risk 0.1`")]
    unable = sum(
        choice.choose(bench.outcomes_of(one, "calibration"), ANSWER, "risk", 0.1)["threshold"]
        is None
        for one in rows
    )
    assert (f"{unable} pass everything on" in nothing) == bool(unable)


def test_two_procedures_are_compared_on_the_same_halves(bench):
    lines = bench.procedures([row(1, n=100)], splits=6).splitlines()[2:]
    assert [line.split(" | ")[2:4] for line in lines] == [
        ["0.15", "all shares at once"],
        ["0.15", "a sequence of thresholds"],
        ["0.1", "all shares at once"],
        ["0.1", "a sequence of thresholds"],
    ]
    assert all("| 6 |" in line for line in lines)


def test_the_committed_table_is_of_the_committed_rows(bench):
    assert bench.TABLE.read_text(encoding="utf-8") == bench.table(bench.read_rows())
