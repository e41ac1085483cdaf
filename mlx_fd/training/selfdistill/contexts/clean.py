"""The question without the noise that the student read it with."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.problems.kinds import form_of
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.training.selfdistill.contexts import (
    Attempt,
    Context,
    Materials,
    View,
    register_context,
    student_prompt,
)


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """The clean question, where the student read it with noise (EchoDistill, 2605.23954)."""
    return [
        View(student_prompt(a), answer_prompt(a.problem.question, form_of(a.problem)))
        for a in attempts
    ]


register_context(
    Context(
        name="clean",
        help="the clean question, where the student read it with noise (EchoDistill, 2605.23954)",
        order=90,
        views=views,
    )
)
