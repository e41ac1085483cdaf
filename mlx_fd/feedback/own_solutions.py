"""The student solves a problem itself, to see whether that bears out its verdict on an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_fd.config import GenerationOptions
from mlx_fd.feedback.asking import Ask, OnTokens, Turns, ask_in_step, usage_of
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import Answered, StudentFeedback, Usage
from mlx_fd.feedback.turns import as_student, read_answer
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.writing import GenerateOptions, sampling_for
from mlx_fd.problems.kinds import form_of, is_comparable, same_final
from mlx_fd.problems.prompts import answer_prompt

STEP = "student_solution"


def write_solutions(
    pair: Pair,
    answered: Answered,
    student: StudentFeedback,
    options: GenerationOptions,
    solutions: int,
) -> Turns[StudentFeedback]:
    """Step 2: the student solves a problem itself, as :func:`solve_alike` has it."""
    problem, final = answered.problem, answered.answer.final
    if not is_comparable(final, problem):
        return student
    prompt = first_prompt(pair.student_lm, answer_prompt(problem.question, form_of(problem)))
    sampling = sampling_for(as_student(options), "answer", 0)
    how = GenerateOptions(reuse=not options.sequential, keep=False)
    alike: list[bool] = []
    for count, temperature in ((min(solutions, 1), 0.0), (max(solutions - 1, 0), 1.0)):
        drawn = dataclasses.replace(sampling, temperature=temperature)
        ask = Ask(pair.student_lm, STEP, Conversation(), prompt, drawn, how)
        for reply in (yield (ask,) * count) if count else ():
            own = read_answer(reply.turn, problem, options).final
            same = same_final(own, final, problem)
            alike += [] if same is None else [same]
            usage = usage_of(STEP, reply.turn, reply.seconds)
            student = dataclasses.replace(student, usage=_once_more(student.usage, usage))
    if not alike:
        return student
    return dataclasses.replace(student, solves_alike=sum(alike) / len(alike))


def solve_alike(
    pair: Pair,
    answered: Sequence[Answered],
    students: Sequence[StudentFeedback],
    options: GenerationOptions,
    solutions: int,
    seed: int,
    on_tokens: OnTokens,
) -> list[StudentFeedback]:
    """Step 2: the student solves the problems itself, to see whether that bears its verdicts out.

    Args:
        pair: the models; only the student writes.
        answered: episodes after step 1.
        students: the student's feedback on each.
        options: token limits.
        solutions: of each problem; the first is greedy, the others are drawn at temperature 1.
        seed: of the draws.
        on_tokens: called for every token.

    Returns:
        Its feedback again, with the share of its solutions that come to the answer's final, where
        final answers can be compared.
    """
    works = [
        write_solutions(pair, one, student, options, solutions)
        for one, student in zip(answered, students, strict=True)
    ]
    return ask_in_step(works, lambda step: seed, on_tokens)


def _once_more(before: Usage, again: Usage) -> Usage:
    """What a step took that was done again."""

    def sums(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        return {**one, **{step: one.get(step, 0) + value for step, value in other.items()}}

    return dataclasses.replace(
        before + again,
        tokens=sums(before.tokens, again.tokens),
        prefilled=sums(before.prefilled, again.prefilled),
        seconds=sums(before.seconds, again.seconds),
    )
