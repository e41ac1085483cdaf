"""The bench of wrong verdicts: what is made wrong, how often, and that its table is its rows'."""

import json

import pytest

from mlx_fd.problems import arithmetic
from support.scripted import script

bench = script("bench_verdicts")
PROBLEMS = arithmetic.load("train").problems[:200]


def test_a_known_share_is_hit_and_a_larger_one_holds_a_smaller_one():
    hit = {
        share: {one.id for one in PROBLEMS if bench.is_hit(3, one.id, share)}
        for share in (0.0, 0.2, 0.4)
    }
    assert not hit[0.0]
    assert hit[0.2] < hit[0.4]
    assert len(hit[0.2]) / 200 == pytest.approx(0.2, abs=0.08)
    assert len(hit[0.4]) / 200 == pytest.approx(0.4, abs=0.1)
    assert hit[0.2] != {one.id for one in PROBLEMS if bench.is_hit(4, one.id, 0.2)}


def test_the_contrary_is_said_in_the_experts_form():
    for problem, drawn in zip(PROBLEMS[:20], arithmetic.problems_of("train"), strict=False):
        of_right = bench.contrary(problem, problem.solution, True, 0)
        assert of_right.written_score < 0
        assert arithmetic.first_error(of_right.text) > 0
        assert of_right == bench.contrary(problem, problem.solution, True, 0)
        wrong = arithmetic.wrong_answer(bench.random.Random(1), drawn)
        of_wrong = bench.contrary(problem, wrong, False, 0)
        assert of_wrong.written_score == 1
    assert bench.contrary(PROBLEMS[0], "no steps at all", False, 0).written_score == 1


def test_the_table_is_made_of_the_rows(tmp_path):
    def row(arm, seed, found, left_out=0):
        verdicts = {"known": 8, "contradicted": 4, "left_out": left_out, "asked_again": 0}
        return {
            **{"arm": arm, "seed": seed, "episodes": 8, "verdicts": verdicts},
            **{"wrong": "1100", "found": ["", found], "score_error": [[], [0.5] * 4]},
        }

    rows = [
        *(row("as-is 0 %", seed, "1111") for seed in (0, 1)),
        *(row("as-is 40 %", seed, "1010") for seed in (0, 1)),
        *(row("checked 40 %", seed, "1111", 4) for seed in (0, 1)),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    lines = bench.table(path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:7]]
    assert [one[:2] for one in cells] == [
        ["0%", "`as-is`"],
        ["40%", "`as-is`"],
        ["40%", "`checked`"],
    ]
    assert [one[2].split()[0] for one in cells] == ["100.0", "50.0", "100.0"]
    assert cells[2][3].strip("*").startswith("+50.0")
    assert cells[1][4].strip("*").startswith("-50.0")
    assert [one[-3:] for one in cells] == [["0", "0", "8"], ["0", "0", "8"], ["4", "0", "4"]]
    pairs = [line for line in lines if line.startswith("| checked 40 % | as-is 40 %")]
    assert "+50.0" in pairs[0].split("|")[3] and "+0.0" in pairs[0].split("|")[5]
