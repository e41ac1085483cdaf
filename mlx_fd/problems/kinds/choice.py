"""One of several choices, which the question lists by letter."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.kinds.text import normal
from mlx_fd.problems.parsing import after_mark, boxed
from mlx_fd.problems.prompts import Form
from mlx_fd.problems.thoughts import without_thoughts

LETTERS = string.ascii_uppercase
# A letter by itself: "B", "(b)", "**B**", "B.", "B) the second", "Answer: B", "option B".
_LETTER = re.compile(
    r"[\s*_`\"'(\[{<$\\]*+(?:(?:the|correct|final|right|answer|option|choice|is)\b[\s:*_`(]*+){0,6}"
    r"(?:(?:text|math)(?:bf|rm)?\{\(?)?([A-Za-z])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
_WORD = r"\b(?i:answer|choice|option)\b"
_BEGIN, _END = r"[\s:*_`\"'(\[$]{0,12}+", r"([A-Z])(?![A-Za-z0-9'])"
_SAID = re.compile(rf"{_WORD}(?:\s++is\b|\s*+:){_BEGIN}{_END}")
# One that is spoken of, be it right or wrong.
_NAMED_LETTER = re.compile(rf"{_WORD}{_BEGIN}{_END}")


def listed(question: str, choices: Sequence[str]) -> str:
    """A question with its choices below it, each with its letter."""
    lines = [
        f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)
    ]
    return "\n".join([question.strip(), *lines])


def choices_in(question: str) -> tuple[str, ...]:
    """The choices that :func:`listed` put below a question; empty where there are none."""
    found: list[str] = []
    for line in question.splitlines():
        if len(found) < len(LETTERS) and line.startswith(f"{LETTERS[len(found)]}. "):
            found.append(line[3:].strip())
    return tuple(found)


def letter_of(text: str, choices: Sequence[str]) -> str | None:
    """Which of the choices a short text means, by its letter or in its words."""
    valid = LETTERS[: len(choices)]
    words = normal(text)
    same = [
        letter for letter, choice in zip(valid, choices, strict=True) if normal(choice) == words
    ]
    if len(same) == 1:
        return same[0]
    match = _LETTER.match(text)
    if match is None or match[1].upper() not in valid:
        return None
    # "A dog" begins with an article, "A. a dog" with a letter: what follows must be the choice.
    letter, rest = match[1].upper(), normal(text[match.end() :].strip(" $>})"))
    choice = normal(choices[valid.index(letter)])
    fits = not rest or rest == choice or choice.startswith(rest) or rest.startswith(choice)
    return letter if fits or text[match.end() : match.end() + 1] in ".):*" else None


def _read(text: str, problem: Problem, how: str) -> str | None:
    text = without_thoughts(text)
    for piece in (after_mark(text), boxed(text)):
        if piece is not None and (letter := letter_of(piece, problem.choices)):
            return letter
    valid = LETTERS[: len(problem.choices)]
    said: list[str] = [letter for letter in _SAID.findall(text) if letter in valid]
    if said:
        return said[-1]
    named: set[str] = {letter for letter in _NAMED_LETTER.findall(text) if letter in valid}
    return named.pop() if len(named) == 1 else letter_of(text, problem.choices)


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    """A choice's index from 0 where it is an integer, else its letter or text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        letter = LETTERS[answer] if 0 <= answer < len(choices) else None
    else:
        text = str(answer)
        letter = letter_of(((after_mark(text) or "") if "####" in text else text).strip(), choices)
    if letter is None:
        raise ValueError(
            f"'answer' is none of the {len(choices)} choices, by letter, text or, as an integer, "
            "by its place from 0"
        )
    return letter


register_kind(
    AnswerKind(
        name="choice",
        help="one of the choices that the question lists, by letter",
        order=30,
        form=Form(end="End with a line of its own: #### <letter>"),
        read=_read,
        same=lambda final, problem: final == problem.answer,
        gold=_gold,
    )
)
