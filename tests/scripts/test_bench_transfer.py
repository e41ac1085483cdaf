"""The bench of experts made worse: its table is its rows', and seeds share no problems."""

import json

import numpy as np
import pytest
from scipy import stats

from mlx_fd.evaluation.processbench import f1
from support.scripted import script

bench = script("bench_transfer")
SEEDS, SIZE = range(3), 20
RIGHT = {384: 32, 208: 20}


def model(rng, truth, share):
    """What a model makes of questions, so much of it right."""
    named = [t if rng.random() < share else "-" for t in truth]
    return {"named": "".join(named), "solved": bench.bits(rng.random(len(truth)) < share)}


def row(neurons, seed):
    rng = np.random.default_rng([neurons, seed])
    truth = "".join("012"[k % 3] for k in range(3 * SIZE))
    right = RIGHT[neurons] - seed
    return {
        "neurons": neurons,
        "seed": seed,
        "headroom": {
            "problems": 32,
            "expert_right": right,
            "student_right": 22,
            "expert_judged": 32,
            "expert_judged_right": right,
            "student_judged": 32,
            "student_judged_right": 21,
        },
        "expert_verdicts": {"known": 64, "contradicted": 64 - 2 * right},
        "episodes": {
            "first": "10" * 32,
            "final": "1" * 2 * right + "0" * (64 - 2 * right),
            "expert": "10" * 8 + "11" * 24,
            "student": "1" * 64,
        },
        "truth": truth,
        "expert": model(rng, truth, right / 32),
        "before": model(np.random.default_rng(seed), truth, 0.3),
        "after": model(rng, truth, right / 40),
    }


@pytest.fixture(scope="module")
def rows():
    return [row(neurons, seed) for neurons in RIGHT for seed in SEEDS]


def lines_of(table, neurons):
    found = [line.split("|")[1:-1] for line in table.splitlines() if f"| {neurons} " in line[:7]]
    return [[cell.strip() for cell in line] for line in found]


def test_the_table_is_made_of_the_rows(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*rows[::-1], rows[0]]))
    made = bench.table(path)
    whole = [one for one in rows if one["neurons"] == 384]
    solved, first_errors, *_ = lines_of(made, 384)

    def marks(who, place):
        part = slice(place * SIZE, (place + 1) * SIZE)
        return [np.array([int(bit) for bit in one[who]["solved"][part]]) for one in whole]

    before, after, expert = (100 * np.mean(marks(who, 0)) for who in ("before", "after", "expert"))
    assert [float(cell) for cell in solved[2:5]] == pytest.approx([expert, before, after], abs=0.05)
    apart = 100 * (np.mean(marks("after", 0), axis=1) - np.mean(marks("before", 0), axis=1))
    said, bounds = solved[5].strip("*").split(" ", 1)
    assert float(said) == pytest.approx(apart.mean(), abs=0.05)
    low, high = stats.t.interval(0.95, 2, apart.mean(), stats.sem(apart))
    got = [float(bound) for bound in bounds.strip("()").split(" to ")]
    # Of so few runs the spread of the questions may be the larger one.
    assert got[0] <= low + 0.05 and got[1] >= high - 0.05

    hits = [
        [a == b for a, b in zip(one["truth"], one["after"]["named"], strict=True)][:SIZE]
        for one in whole
    ]
    wrong = [[t != "0" for t in one["truth"][:SIZE]] for one in whole]
    expected = 100 * f1(np.ravel(hits).astype(float), np.ravel(wrong).astype(float))
    assert float(first_errors[4]) == pytest.approx(expected, abs=0.05)
    assert len(lines_of(made, 384)) == len(bench.SETS) * len(bench.MEASURES) + 1

    check = lines_of(made, 208)[-1]
    assert check[1:5] == ["19.0", "22.0", "19.0", "21.0"]
    assert check[5:7] == ["75", "50"]
    # 20, 19 and 18 right answers against 22, and as many right verdicts against 21.
    assert check[7:10] == ["3 of 3", "3 of 3", "0 of 3"]
    assert check[10:] == ["50.0", f"{100 * 19 / 32:.1f}", f"{100 * 13 / 32:.1f}"]


def test_a_run_makes_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PROBE", 2)
    short = {"probe_size": 2, "batch_size": 2, "kd_steps": 1, "step_samples": 2, "losses": ("lm",)}
    monkeypatch.setattr(bench, "OPTIONS", bench.OPTIONS | short)
    made = bench.row_of(208, 3, tmp_path, 2, 2)
    assert [len(made["truth"]), made["truth"][::2]] == [6, "000"]
    for who in ("expert", "before", "after"):
        assert [len(made[who]["named"]), len(made[who]["solved"])] == [6, 6]
    assert made["headroom"]["problems"] == 2 and made["updates"] == 1
    assert {len(text) for text in made["episodes"].values()} == {2}


def test_what_is_known_before_is_held_against_what_came(rows):
    gains = [np.mean(bench.marks(one, "same", "after", "solved")) for one in rows]
    gains -= np.array([np.mean(bench.marks(one, "same", "before", "solved")) for one in rows])
    known = [one["headroom"]["expert_right"] - 22 for one in rows]
    found = bench.rank_correlation(rows, "answers", "same", "solved")
    assert found.value == pytest.approx(stats.spearmanr(known, gains).statistic)
    assert found.low <= found.value <= found.high <= 1 and found.n == 3
    # Of the first batch's answers it passes all 16 right ones, and finds 8 of the 16 wrong ones.
    assert bench.balanced(rows[0], "expert") == pytest.approx((1 + 8 / 16) / 2)
    assert bench.balanced(rows[0], "student") == pytest.approx(0.5)


def test_seeds_share_no_problems():
    drawn = [
        {one.problem.question for one in bench.questions(seed, 30, name)}
        for seed in (0, 1)
        for name in bench.SETS
    ]
    assert len(set().union(*drawn)) == 6 * 30
    asked = bench.questions(1, 30, "longer")
    assert [one.first_error > 0 for one in asked] == [False, True] * 15
    assert {one.problem.solution.count("<<") for one in asked} == {3, 4}


def test_the_table_in_the_docs_is_that_of_its_rows():
    assert bench.TABLE.read_text() == bench.table(bench.ROWS)


def test_what_the_docs_say_of_it_is_in_the_table():
    page = (bench.DOCS / "benchmarks.md").read_text().split("## Experts made worse")[1]
    excerpt = page.split("## ")[0].splitlines()
    whole = bench.TABLE.read_text().split("**longer**")[0].splitlines()
    said = [line.split("|")[1:-1] for line in excerpt if line.startswith("| ") and "%" in line]
    assert len(said) == len(bench.EXPERTS)
    for neurons, cells in zip(bench.EXPERTS, said, strict=True):
        solved, f1, named, _ = [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in whole
            if line.startswith(f"| {neurons} ")
        ]
        shown = [cell.strip() for cell in cells]
        assert shown[:2] == [f"{solved[2]} %", f"{named[2]} %"]
        assert shown[2:5] == [named[5], f1[5], solved[5]]
