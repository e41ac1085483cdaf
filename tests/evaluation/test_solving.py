"""What a set of problems says of replies that are there already."""

import pytest

from mlx_fd.evaluation.baselines import Trial
from mlx_fd.evaluation.readers import Readers
from mlx_fd.evaluation.solving import Solving
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import KINDS, is_right


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


@pytest.mark.parametrize(
    ("gold", "reply", "strict", "flexible"),
    [
        ("18", "#### 18", True, True),
        ("18", "#### 17", False, False),
        ("$1,234.50", "#### 1234.50", True, True),
        ("-3", "#### -3", True, True),
        # No reply could match these: "18" is not "18 eggs".
        ("18 eggs", "#### 18 eggs", None, None),
        ("50%", "#### 50%", None, None),
        ("3/4", "#### 3/4", None, None),
    ],
)
def test_the_harness_judges_golds_that_it_can_read(gold, reply, strict, flexible):
    right = KINDS["number"].gold(gold, ())
    problem = Problem("a", "How many?", f"#### {gold}", right, published=gold)
    one = Solving("eggs/test", [problem], ("student",), 1, Readers())
    row = one.row(problem, Trial({"answer": reply}, "answer", None, {}, {}, {}, {}, ()), "auto")
    assert (row["strict"], row["flexible"]) == (strict, flexible)
    assert row["correct"] is (strict is not False)


def test_columns_of_the_harness_are_of_the_problems_that_it_can_judge():
    items = [Problem(str(n), "How many?", "", "18") for n in range(3)]
    one = Solving("eggs/test", items, ("student",), 1, Readers())
    row = {"final": "18", "correct": True, "first_correct": True, "score": None}
    row |= {"turns": {"answer": ""}, "last": "answer"}

    def found(*judged):
        rows = [[{**row, "strict": right, "flexible": None}] for right in judged]
        return {measure.name: measure.estimate() for measure in one.measures(rows)}

    strict = found(True, None, False)["accuracy_strict"]
    assert (strict.value, strict.n) == (0.5, 2)
    assert "accuracy_flexible" not in found(True, None, False)
    assert "accuracy_strict" not in found(None, None, None)
