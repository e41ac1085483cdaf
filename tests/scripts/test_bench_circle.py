"""The circle's committed rows and table belong together, and its columns are right."""

import numpy as np
import pytest

from mlx_fd.evaluation.cascade import choice
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.scores import ANSWER
from support.scripted import script


@pytest.fixture(scope="module")
def bench():
    return script("bench_circle")


def part(rng, n, student):
    scores = rng.uniform(0, 1, n)
    right = "".join(str(int(rng.random() < student + (1 - student) * score)) for score in scores)
    columns = {"student": right, "expert": "1" * n, "expert_tokens": [20] * n}
    return {**columns, "scores": scores.round(5).tolist()}


def row(seed):
    rng = np.random.default_rng(seed)
    sizes = {"calibration": 400, "held_out": 300}
    return {
        "seed": seed,
        "episodes": 96,
        "asked": 200,
        "kept": 90 + seed,
        "learned_from": 72,
        "before": {what: part(rng, n, 0.3) for what, n in sizes.items()},
        "after": {what: part(rng, n, 0.6) for what, n in sizes.items()},
    }


def test_what_is_passed_on_counts_as_the_experts(bench):
    found = [
        Outcome("a", 0.9, student=True, expert=False, student_tokens=1, expert_tokens=1),
        Outcome("b", 0.2, student=False, expert=True, student_tokens=1, expert_tokens=1),
        Outcome("c", 0.1, student=True, expert=False, student_tokens=1, expert_tokens=1),
    ]
    passed, right, student = bench.used(found, 0.5)
    assert (passed.tolist(), right.tolist()) == ([0, 1, 1], [1, 1, 0])
    assert student.tolist() == [1, 0, 1]
    assert bench.used(found, None)[0].tolist() == [1, 1, 1]


def test_a_table_has_each_way_and_how_it_changed(bench):
    rows = [row(seed) for seed in (1, 2, 3)]
    lines = bench.table(rows).splitlines()
    assert "seeds 1, 2, 3 after 96 episodes each" in lines[0]
    assert "passed on 91, 92, 93 of 200" in lines[0]
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[4:]}
    before, again = (float(cells[way][0].split()[0]) for way in (bench.WAYS[0], bench.WAYS[2]))
    change = float(cells["change, calibrated again (points)"][0].split()[0])
    assert change == pytest.approx(again - before, abs=0.11) and change < 0
    shares = []
    for one in rows:
        calibration = bench.outcomes_of(one["after"], "calibration")
        least = choice.choose(calibration, ANSWER, "accuracy", 0.85)["threshold"]
        shares.append(np.mean(np.array(one["after"]["held_out"]["scores"]) < least))
    assert again == pytest.approx(100 * np.mean(shares), abs=0.06)


def test_the_committed_table_is_of_the_committed_rows(bench):
    assert bench.TABLE.read_text(encoding="utf-8") == bench.table(bench.read_rows())
