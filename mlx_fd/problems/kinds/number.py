"""One number, compared exactly."""

from __future__ import annotations

from typing import Any

from mlx_fd.problems import Problem, parsing
from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.prompts import NUMBER


def _read(text: str, problem: Problem, how: str) -> str | None:
    value = parsing.final_answer(text, how)
    return None if value is None else str(value)


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"'answer' is not text but {type(answer).__name__}")
    # Of a float the shortest text that is this float.
    text = parsing.gold_part(str(answer))
    if not parsing.is_number(text):
        raise ValueError("no final number in 'answer': it is a number, or ends in '#### <number>'")
    return str(parsing.number(text))


register_kind(
    AnswerKind(
        name="number",
        help="one number, compared exactly",
        order=10,
        form=NUMBER,
        read=_read,
        same=lambda final, problem: final in (problem.answer, *problem.also_right),
        gold=_gold,
    )
)
