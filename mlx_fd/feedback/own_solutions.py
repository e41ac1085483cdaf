"""The student solves a problem itself, to see whether that bears out its verdict on an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_fd.config import GenerationOptions
from mlx_fd.feedback.episode import (
    Answered,
    OnTokens,
    StudentFeedback,
    Usage,
    as_student,
    generate_step,
    read_answer,
)
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.writing import GenerateOptions, sampling_for
from mlx_fd.problems.kinds import form_of, kind_of, same_final
from mlx_fd.problems.prompts import answer_prompt


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
    comparable = [
        index
        for index, one in enumerate(answered)
        if one.answer.final is not None and kind_of(one.problem).exclusive
    ]
    found = list(students)
    alike: dict[int, list[bool]] = {index: [] for index in comparable}
    for count, temperature in ((min(solutions, 1), 0.0), (max(solutions - 1, 0), 1.0)):
        indices = comparable * count
        problems = [answered[index].problem for index in indices]
        sampling = sampling_for(as_student(options), "answer", seed)
        turns, usages = generate_step(
            pair.student_lm,
            "student_solution",
            [Conversation()] * len(problems),
            [
                first_prompt(pair.student_lm, answer_prompt(p.question, form_of(p)))
                for p in problems
            ],
            dataclasses.replace(sampling, temperature=temperature),
            on_tokens,
            GenerateOptions(reuse=not options.sequential, keep=False),
        )
        for index, turn, usage in zip(indices, turns, usages, strict=True):
            one = answered[index]
            same = same_final(
                read_answer(turn, one.problem, options).final, one.answer.final, one.problem
            )
            alike[index] += [] if same is None else [same]
            found[index] = dataclasses.replace(
                found[index], usage=_once_more(found[index].usage, usage)
            )
    return [
        dataclasses.replace(one, solves_alike=sum(of) / len(of))
        if (of := alike.get(index))
        else one
        for index, one in enumerate(found)
    ]


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
