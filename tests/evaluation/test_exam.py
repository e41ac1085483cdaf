"""What two examinations on the same questions say beside each other."""

import pytest

from mlx_fd.evaluation.exam import Result, compare
from mlx_fd.runs.summary import wilson


def results(found: str) -> list[Result]:
    """One for each mark, ``+``: found, ``-``: not; every second answer is wrong."""
    return [
        Result(place % 2 == 1, 0.5 + place, 1.0, True, mark == "+", mark == "+")
        for place, mark in enumerate(found)
    ]


def test_shares_have_wilsons_interval_and_few_differences_are_none():
    rows = compare(results("+-+-+-+-"), results("++++++++"))
    found = rows["first_error_on_wrong"]
    for side, right in (("before", 0), ("after", 4)):
        low, high = wilson(right, 4)
        assert found[side] == pytest.approx({"value": right / 4, "low": low, "high": high, "n": 4})
    # All four go one way, as four coins do once in eight times.
    assert (found["change"]["value"], found["change"]["low"], found["change"]["high"]) == (1, 0, 1)
    assert rows["readable"]["after"]["low"] == pytest.approx(wilson(8, 8)[0])
    assert rows["solved"]["change"]["n"] == rows["score_error"]["before"]["n"] == 8
    # All are found: the F1 of two lower limits, both those of four of four.
    after = rows["first_error_f1"]["after"]
    assert (after["value"], after["high"]) == (1, 1)
    assert after["low"] == pytest.approx(wilson(4, 4)[0])
    # None of the wrong ones, all of the right ones: up to 2 ab / (a + b) of their upper limits.
    before, most = rows["first_error_f1"]["before"], wilson(0, 4)[1]
    assert (before["value"], before["low"]) == (0, 0)
    assert before["high"] == pytest.approx(2 * most / (most + 1))
    gap = rows["score_error"]["before"]
    assert gap["value"] == 4 and 2 < gap["low"] < 4 < gap["high"] < 6
