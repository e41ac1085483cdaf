"""Attempts of learners: what is read, what is marked, and what a hint must not say."""

import random
import re

import pytest

from mlx_fd.feedback.tutoring import (
    HIDDEN,
    Attempt,
    Heard,
    agreement,
    as_asked,
    marked,
    read_attempt,
    without_numbers,
    write_attempt,
)
from mlx_fd.problems import arithmetic
from mlx_fd.problems.sources import step_writer

NUMBER = re.compile(r"\d+")


@pytest.mark.parametrize(
    ("text", "steps", "final"),
    [
        ("47+2=49\n49-16=33\n#### 33", ("47+2=49", "49-16=33"), "33"),
        ("Step 1: 47+2=49\n\nstep 2) 49-16=33\nAnswer: 33", ("47+2=49", "49-16=33"), "33"),
        ("1. a\n2) b\n  3: c", ("a", "b", "c"), ""),
        ("3.5+1=4.5\n12 apples are left", ("3.5+1=4.5", "12 apples are left"), ""),
        ("#### 7", (), "7"),
        ("Final answer = x^2\n", (), "x^2"),
        ("The answer is 3", ("The answer is 3",), ""),
        (" \n\t\n", (), ""),
    ],
)
def test_an_attempt_is_read_line_by_line(text, steps, final):
    assert read_attempt(text) == Attempt(steps, final)


def test_a_typed_attempt_is_the_generators_own_solution():
    """What a learner types is, written down, what the student learned on."""
    for exercise in arithmetic.problems_of("test")[:40]:
        typed = "\n".join(str(step).replace("=", " = ") for step in exercise.steps)
        attempt = read_attempt(f"{typed}\n#### {exercise.steps[-1].result}")
        assert write_attempt(attempt, step_writer("arithmetic")) == exercise.solution
    assert step_writer("some/file.jsonl")("47+2=49") == "47+2=49"
    assert step_writer("arithmetic")("then 47+2=49") == "then 47+2=49"


def test_hints_on_every_kind_of_error_keep_the_right_numbers():
    """Right feedback on wrong attempts: no hint has a number that the learner has not seen."""
    rng = random.Random(0)
    for exercise in arithmetic.problems_of("test")[:200]:
        text = arithmetic.wrong_answer(rng, exercise)
        attempt = read_attempt(text)
        answer = write_attempt(attempt, step_writer("arithmetic"))
        said = arithmetic.feedback_text(exercise.solution, answer)
        right = str(exercise.steps[-1].result)
        asked = as_asked(exercise.question, "number")
        agrees = agreement(asked, answer, right)
        seen = marked(exercise.question, attempt, Heard(said, -0.5, right, agrees))
        first = arithmetic.judge(exercise.solution, answer).first_error
        assert seen.first_wrong == first and seen.state in ("wrong", "unsure")
        assert seen.hints and seen.marks.count("wrong") == (first <= len(attempt.steps))
        assert all(mark == "right" for mark in seen.marks[: first - 1])
        known = set(NUMBER.findall("\n".join((exercise.question, text))))
        for place, hint in enumerate(seen.hints):
            shown = re.sub(r"\b[Ss]tep \d+", "", hint)
            assert set(NUMBER.findall(shown)) <= (known if place == 2 else set()), hint


@pytest.mark.parametrize(
    ("first", "score", "agrees", "state"),
    [
        ("Every step is right.", 0.9, True, "right"),
        ("Every step is right.", None, None, "right"),
        ("Every step is right.", 0.9, False, "unsure"),
        ("Every step is right.", -0.9, True, "unsure"),
        ("Hm.", None, True, "right"),
        ("Hm.", None, None, "unsure"),
        ("Hm.", 0.0, None, "unsure"),
        ("Hm.", -0.1, False, "wrong"),
    ],
)
def test_signs_that_contradict_each_other_are_no_verdict(first, score, agrees, state):
    seen = marked("P", Attempt(("a",), "1"), Heard(first, score, "1", agrees))
    assert seen.state == state
    assert bool(seen.hints) == (state != "right")
    assert seen.marks == (("right",) if first.startswith("Every") else ("open",))


@pytest.mark.parametrize(
    ("final", "mark", "state"), [("", "open", "right"), ("5", "wrong", "unsure")]
)
def test_an_attempt_that_states_no_answer_yet_has_none_that_is_wrong(final, mark, state):
    attempt = Attempt(("2+3=5",), final)
    answer = write_attempt(attempt, step_writer(""))
    asked = as_asked("Tom has 2 and gets 3, twice. How many?", "number")
    agrees = agreement(asked, answer, "10")
    assert agrees is False
    seen = marked(asked.question, attempt, Heard("Every step is right.", 0.9, "10", agrees))
    assert (seen.final, seen.state) == (mark, state)


@pytest.mark.parametrize(
    ("kind", "problem", "answer", "own", "agrees"),
    [
        ("number", "P", "Step 1: x\n#### 8.50", "17/2", True),
        ("number", "P", "no answer", "17/2", None),
        ("choice", "Which?\nA. a dog\nB. a cat", "#### a cat", "B", True),
        ("choice", "Which?\nA. a dog\nB. a cat", "#### A", "B", False),
        ("text", "P", "#### the Paris", "Paris", True),
        ("none", "P", "#### 3", "3", None),
        ("code", "P", "#### 3", "assert False", None),
    ],
)
def test_final_answers_are_compared_by_their_kind(kind, problem, answer, own, agrees):
    assert agreement(as_asked(problem, kind), answer, own) is agrees


@pytest.mark.parametrize(
    ("text", "before", "secret", "hint"),
    [
        ("Step 2 should be 49-16=33.", "49, 16", (), f"Step 2 should be 49-16={HIDDEN}."),
        ("It is 1,200, not 12.", "12", (), f"It is {HIDDEN}, not 12."),
        ("Take paris, not Parish or A.", "", ("Paris",), f"Take {HIDDEN}, not Parish or A."),
        ("A dog: a, not B.", "", ("B",), f"A dog: a, not {HIDDEN}."),
        ("It is 17/2.", "17 2", ("17/2",), f"It is {HIDDEN}."),
        ("\u0130\u0130 Paris", "", ("Paris",), f"\u0130\u0130 {HIDDEN}"),
    ],
)
def test_what_a_hint_leaves_out(text, before, secret, hint):
    assert without_numbers(text, before, secret) == hint
