"""What a set of problems says of replies that are there already."""

import pytest

from mlx_fd.evaluation.readers import Readers
from mlx_fd.evaluation.solving import Solving
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import is_right


def measured(items, finals):
    """Measures by name, of one reply to each problem or several."""
    one = Solving("names/test", items, ("student",), len(finals[0]), Readers())
    rows = [
        [
            {
                "final": final,
                "correct": is_right(final, problem),
                "first_correct": False,
                "score": None,
                "turns": {"answer": ""},
                "last": "answer",
            }
            for final in of
        ]
        for problem, of in zip(items, finals, strict=True)
    ]
    return {measure.name: measure.estimate() for measure in one.measures(rows)}


def test_texts_have_the_f1_of_their_words_with_the_nearest_right_answer():
    items = [
        Problem("a", "Who?", "", "Ada Lovelace", "text", (), ("Countess of Lovelace",)),
        Problem("b", "Where?", "", "London", "text"),
    ]
    found = measured(items, [["countess lovelace", "ada lovelace"], [None, "london"]])
    # Two of the three words of "countess of lovelace", both of ours; then all; then none and all.
    assert found["token_f1"].value == pytest.approx((2 * 2 / 5 + 1 + 0 + 1) / 4)
    assert found["accuracy"].value == pytest.approx((0.5 + 0.5) / 2)
    choices = [Problem("c", "Which?", "", "B", "choice", ("up", "down"))]
    assert "token_f1" not in measured(choices, [["B"]])


def test_one_value_in_several_forms_is_one_vote():
    """Each form was a vote of its own, and the wrong value with two votes won."""
    items = [Problem("a", "?", "", "0.5", "math")]
    found = measured(items, [["0.5", "3", "3", "\\frac{1}{2}", "\\frac{2}{4}"]])
    assert found["maj@5"].value == 1.0 and found["avg@5"].value == 0.6
