"""Feedback on the attempt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.problems import Problem
from mlx_fd.training.selfdistill.contexts import (
    Attempt,
    Context,
    Materials,
    View,
    message,
    quoted,
    register_context,
    student_prompt,
)

if TYPE_CHECKING:
    from mlx_fd.feedback.stages import Finished


def feedback_message(problem: Problem, feedback: str) -> str:
    """The question with feedback on an earlier attempt, which itself is not shown."""
    return message(
        problem,
        f"Feedback on an earlier attempt of yours:\n{quoted(feedback)}",
        "Mind it, and solve the problem anew.",
    )


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """Feedback on the attempt, in a paragraph."""
    from mlx_fd.training.selfdistill.critics import feedbacks

    return [
        View(student_prompt(a), feedback_message(a.problem, text), note=text)
        for a, text in zip(attempts, feedbacks(attempts, materials), strict=True)
    ]


def from_episode(finished: Finished) -> str | None:
    """The expert's feedback, where it was requested."""
    expert = finished.judged.expert
    if expert is None:
        return None
    return feedback_message(finished.problem, expert.feedback.text)


register_context(
    Context(
        name="feedback",
        help="feedback on the attempt, in a paragraph",
        order=40,
        views=views,
        options=frozenset({"critic"}),
        from_episode=from_episode,
    )
)
