"""Rows of benchmarks: what of a file counts, and how numbers are written."""

import json

import pytest

from mlx_fd.evaluation.statistics import Estimate
from support.scripted import script

rows = script("rows")


def test_the_last_row_of_a_key_counts_and_rows_go_by_key(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert rows.latest(file, "seed") == {}
    for seed, arm, right in ((2, "b", 1), (10, "a", 2), (2, "b", 3), (2, "a", 4)):
        rows.add(file, {"seed": seed, "arm": arm, "right": right})
    assert [json.loads(line)["right"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
    found = rows.latest(file, "arm", "seed")
    assert [(key, row["right"]) for key, row in found.items()] == [
        (("a", 2), 4),
        (("a", 10), 2),
        (("b", 2), 3),
    ]
    arms = rows.of_arms(file, ("b", "none", "a"))
    assert {arm: [row["right"] for row in of] for arm, of in arms.items()} == {
        "b": [3],
        "a": [4, 2],
    }
    assert list(arms) == ["b", "a"]


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.01, 0.09, "**+5.0 (+1.0 to +9.0)**"),
        (-0.01, 0.11, "+5.0 (-1.0 to +11.0)"),
    ],
)
def test_what_leaves_0_out_is_bold(low, high, text):
    estimate = Estimate(0.05, low, high, 3)
    assert rows.bold(estimate) == text
    assert rows.shown(estimate) == text.strip("*")
    assert rows.shown(estimate, ".2f", 1) == f"0.05 ({low:.2f} to {high:.2f})"


def test_truth_values_are_a_digit_each():
    assert rows.bits([True, False, None, 1]) == "1001"


def test_a_share_stays_within_its_bounds_and_no_spread_is_no_interval():
    assert rows.shown(Estimate(0.976, 0.952, 1.004, 5), ".1f") == "97.6 (95.2 to 100.0)"
    assert rows.shown(Estimate(0.02, -0.01, 0.05, 5), ".1f") == "2.0 (0.0 to 5.0)"
    assert rows.shown(Estimate(0.9, -0.1, 1.2, 5)) == "+90.0 (-10.0 to +120.0)"
    assert rows.shown(Estimate(0.9, -0.1, 1.2, 5), ".1f", 1) == "0.9 (-0.1 to 1.2)"
    for n, says in ((5, "the same in each run"), (1, "one run")):
        same = Estimate(0.0, float("nan"), float("nan"), n)
        assert rows.shown(same) == rows.bold(same) == f"+0.0 ({says})"
