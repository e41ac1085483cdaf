"""Generated word problems as a source (:mod:`mlx_fd.problems.arithmetic`), and what it knows."""

from __future__ import annotations

import random

from mlx_fd.problems import Problem, arithmetic
from mlx_fd.problems.sources import ProblemSource, Question, Truth, register_source


def questions(
    size: int, seed: int, split: str = "test", *, hard: bool = False
) -> tuple[Question, ...]:
    """Draw an examination: ``size`` problems of a split, every second answer wrong."""
    rng = random.Random(f"exam/{seed}")
    drawn = arithmetic.exercises(split, seed, steps=arithmetic.HARD_STEPS if hard else ())
    name = f"{arithmetic.HARD}-exam" if hard else "exam"
    found = []
    for place in range(size):
        exercise = next(drawn)
        text = arithmetic.wrong_answer(rng, exercise) if place % 2 else exercise.solution
        verdict = arithmetic.judge(exercise.solution, text)
        problem = Problem(
            f"{name}-{split}-{place:04d}",
            exercise.question,
            exercise.solution,
            str(exercise.steps[-1].result),
        )
        found.append(Question(problem, text, verdict.first_error, verdict.score))
    return tuple(found)


def is_hard(problem: Problem) -> bool:
    """Whether a problem is one of the other source of such problems."""
    return problem.id.startswith(f"{arithmetic.HARD}-")


TRUTH = Truth(
    knows=lambda problem: arithmetic.is_generated(problem.solution) and not is_hard(problem),
    judge=lambda problem, answer: arithmetic.judge(problem.solution, answer),
    feedback=lambda problem, answer: arithmetic.feedback_text(problem.solution, answer),
    rewrite=lambda problem, answer: arithmetic.true_rewrite(problem.solution, answer),
    questions=questions,
    error_span=lambda problem, answer: arithmetic.error_span(problem.solution, answer),
    prose=lambda problem: arithmetic.prose(problem.solution),
    lessons={
        arithmetic.SLIP: "Calculate every step a second time before going on.",
        arithmetic.OPERATION: "Ask of each sentence whether things come, go or multiply.",
        arithmetic.QUANTITY: "Look up each number in the question again before using it.",
        arithmetic.MISSED: ("Make a step of every sentence that changes the number asked for."),
        arithmetic.EXTRA: "Leave out what does not change the number asked for.",
        arithmetic.FINAL: "Repeat the last result as the final number.",
    },
)

register_source(
    ProblemSource(
        name="arithmetic",
        help="generated word problems of one to four steps with numbers below 100, which the tiny "
        "models know; the truth about any answer is known",
        order=20,
        load=arithmetic.load,
        transfer_split="transfer",
        write_step=arithmetic.write_step,
        truth=TRUTH,
    )
)
