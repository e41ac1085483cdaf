"""A student outside of its run, in use with the score head that an export has beside it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_fd.errors import UserError
from mlx_fd.models.generation import chat_text
from mlx_fd.models.loading import Loaded
from mlx_fd.models.score_head import SCORE_HEAD, ScoreHead, from_file
from mlx_fd.models.student import Student
from mlx_fd.problems.kinds import KINDS
from mlx_fd.problems.prompts import FEEDBACK_OPENING, Form, answer_prompt, feedback_prompt

_PROBLEM, _ANSWER = "\u241fproblem\u241f", "\u241fanswer\u241f"


def head_beside(folder: Path) -> ScoreHead | None:
    """The score head in a folder; ``None``: there is none, or its student thinks first.

    Raises:
        UserError: it cannot be read.
    """
    if not (folder / SCORE_HEAD).exists():
        return None
    head = from_file(folder / SCORE_HEAD)
    return head if head.around else None


def prompt_around(loaded: Loaded, form: Form) -> dict[str, str]:
    """A judge's prompt: its text before the problem, between problem and answer, and behind.

    Args:
        loaded: whose template.
        form: how the problem's answer is asked for.

    Returns:
        ``before``, ``between`` and ``after``; nothing where three texts do not make it.
    """
    turns = [answer_prompt(_PROBLEM, form), _ANSWER, feedback_prompt()]
    text = chat_text(loaded, turns) + FEEDBACK_OPENING
    before, _, rest = text.partition(_PROBLEM)
    between, _, after = rest.partition(_ANSWER)
    if not after or any(mark in before + between + after for mark in (_PROBLEM, _ANSWER)):
        return {}
    return {"before": before, "between": between, "after": after}


def kind_of_answers(head: ScoreHead, loaded: Loaded) -> str | None:
    """The kind of the answers that a head learned to judge: whose prompts are those beside it.

    ``None``: the chat template, or a variable of it, is another one than in the training, and what
    the head made of its prompts would mean nothing.
    """
    for kind in KINDS:
        if prompt_around(loaded, KINDS[kind].form) == head.around:
            return kind
    return None


def scoring(head: ScoreHead, loaded: Loaded) -> Student:
    """A model with a head on it that scores, and nothing that learns.

    Raises:
        UserError: the head is another model's.
    """
    width = loaded.view.width
    if head.weight.shape != (1, width):
        raise UserError(
            f"{loaded.path}: its {SCORE_HEAD} is of hidden states of {head.weight.shape[1]} "
            f"numbers, and this model's have {width}; it belongs to another one"
        )
    student = Student(loaded.view, 1, head.about["score_at"])
    student.score_head.weight = mx.array(head.weight)
    student.score_head.bias = mx.array(head.bias)
    student.eval()
    return student
