"""The ablation's committed rows, table and plot belong together, and its statistics are right."""

import json

import numpy as np
import pytest

from support import ROOT
from support.scripted import script


@pytest.fixture(scope="module")
def bench():
    return script("bench_method")


def row(arm, seed, found, solved="0000", tokens=1000):
    return {
        "arm": arm,
        "seed": seed,
        "episodes": 8,
        "updates": 2,
        "tokens": tokens,
        "distil_seconds": 1.0,
        "expert_feedback_tokens": 500,
        "right_final": 6,
        "wrong": "0101",
        "found": ["1010", found],
        "solved": ["0000", solved],
        "score_error": [[1.0] * 4, [0.5] * 4],
    }


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_table_and_plot_are_those_of_the_rows(bench):
    assert bench.TABLE.read_text() == bench.table(bench.ROWS)
    assert bench.PLOT.read_text() == bench.plot(bench.ROWS)


def test_the_benchmarks_page_has_the_tables_rows(bench):
    rows = [line for line in bench.TABLE.read_text().splitlines() if line.startswith("| ")]
    page = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    for arm in ("never", "always", "gated"):
        (wanted,) = [line for line in rows if line.startswith(f"| {arm} |")]
        assert wanted in page


def test_every_arm_has_three_seeds_of_the_same_examination(bench):
    arms = bench.of_arms(bench.ROWS, bench.ARMS)
    assert set(arms) == set(bench.ARMS)
    for rows in arms.values():
        assert [r["seed"] for r in rows] == [0, 1, 2]
        for r, other in zip(rows, arms["always"], strict=True):
            assert r["wrong"] == other["wrong"] and r["found"][0] == other["found"][0]


def test_estimates_by_hand(bench, tmp_path):
    always = [row("always", 0, "1110"), row("always", 1, "1010")]
    gated = [row("gated", 0, "1111"), row("gated", 1, "1111", solved="1100")]
    arms = bench.of_arms(write(tmp_path / "rows.jsonl", [*always, *gated]), bench.ARMS)
    assert list(arms) == ["always", "gated"]
    # Wrong answers are the second and the fourth: found are 1 of 4, then 4 of 4.
    assert bench.change(arms["always"], "found", only_wrong=True).value == pytest.approx(0.25)
    assert bench.change(arms["gated"], "found", only_wrong=True).value == pytest.approx(1.0)
    # F1 is each run's own: one finds half of its errors, the other none.
    assert bench.quality(arms["always"]).value == pytest.approx((2 * 0.5 * 1 / 1.5 + 0) / 2)
    assert bench.against(arms["gated"], arms["always"]).value == pytest.approx(1 - 1 / 3)
    assert bench.change(arms["gated"], "solved").value == pytest.approx(0.25)


def test_a_later_row_takes_an_earlier_ones_place(bench, tmp_path):
    rows = [row("always", 0, "0000"), row("always", 0, "1111"), row("gone", 0, "1111")]
    arms = bench.of_arms(write(tmp_path / "rows.jsonl", rows), bench.ARMS)
    assert np.array_equal(bench.column(arms["always"][0], "found", bench.AFTER), np.ones(4))
    assert list(arms) == ["always"]


def test_seeds_that_one_arm_lacks_are_left_out_of_a_difference(bench, tmp_path):
    rows = [row("always", 0, "1010"), row("always", 1, "1111"), row("gated", 0, "1111")]
    arms = bench.of_arms(write(tmp_path / "rows.jsonl", rows), bench.ARMS)
    assert bench.against(arms["gated"], arms["always"]).value == pytest.approx(1.0)


def test_table_marks_what_is_sure(bench, tmp_path):
    rows = [row("always", s, "1010") for s in range(8)] + [
        row("gated", s, "1111" if s % 2 else "1110") for s in range(8)
    ]
    text = bench.table(write(tmp_path / "rows.jsonl", rows))
    (line,) = [line for line in text.splitlines() if line.startswith("| gated |")]
    assert "| **+75.0 (+" in line and "75.0% |" in line
    (line,) = [line for line in text.splitlines() if line.startswith("| always |")]
    # No spread is no certainty, and never bold.
    assert "| +0.0 (the same in each run) |" in line
