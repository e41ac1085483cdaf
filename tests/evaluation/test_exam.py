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
    assert rows["first_error_f1"]["before"]["value"] == 0
    assert rows["first_error_f1"]["after"]["value"] == 1
    gap = rows["score_error"]["before"]
    assert gap["value"] == 4 and 2 < gap["low"] < 4 < gap["high"] < 6
