"""What two examinations on the same questions say beside each other."""

import dataclasses

import pytest

from mlx_fd.config import Config, override
from mlx_fd.evaluation.exam import Result, compare, exam_digest, load_results, save_results
from mlx_fd.problems.sources import truth_of
from mlx_fd.runs.checked import ChangedFile
from mlx_fd.runs.summary import wilson
from support.pairs import make_dirs


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


def test_results_are_of_the_examination_that_they_were_made_in(tmp_path):
    """Of others with as many wrong answers at the same places, nothing else tells them apart."""
    expert, student = make_dirs(tmp_path)
    questions = truth_of("arithmetic").questions(4, 0, "test")
    others = truth_of("arithmetic").questions(4, 1, "test")
    wrong = [q.first_error > 0 for q in questions]
    assert wrong == [q.first_error > 0 for q in others]
    made = [Result(one, 0.5, 1.0, True, False, False) for one in wrong]
    digest = exam_digest(questions, Config(), [student])
    save_results(tmp_path / "exam.json", made, 1.5, digest)
    assert load_results(tmp_path / "exam.json", questions, digest) == ((made, 1.5), True)

    other_answer = (dataclasses.replace(questions[0], answer="#### 1"), *questions[1:])
    for exam, changes, folders in (
        (others, {}, [student]),
        (other_answer, {}, [student]),
        (questions, {"seed": 1}, [student]),
        (questions, {"max_feedback_tokens": 9}, [student]),
        (questions, {"answer_filter": "strict"}, [student]),
        (questions, {}, [expert]),
        (questions, {}, [student, expert]),
    ):
        other = exam_digest(exam, override(Config(), changes, "test"), folders)
        with pytest.raises(ChangedFile, match="other questions, token limits, or another student"):
            load_results(tmp_path / "exam.json", exam, other)
    # What else a run is asked makes no other examination.
    same = override(Config(), {"episodes": 9, "batch_size": 3, "kd_steps": 1}, "test")
    assert exam_digest(questions, same, [student]) == digest
