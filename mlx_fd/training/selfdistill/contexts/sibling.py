"""An attempt of the student's own that came out right."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.problems import Problem
from mlx_fd.training.selfdistill.contexts import (
    Attempt,
    Context,
    Materials,
    View,
    feedback,
    message,
    quoted,
    register_context,
    siblings_of,
    student_prompt,
)


def sibling_message(problem: Problem, attempt: str) -> str:
    """The question with an attempt of the student's own that came out right."""
    return message(problem, f"An attempt of yours that came out right:\n{quoted(attempt)}")


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """A sibling attempt that came out right, else feedback (SDPO, 2601.20802).

    Where there is neither critic nor truth an attempt without such a sibling teaches nothing.
    """
    right = [siblings_of(attempts, k, correct=True) for k in range(len(attempts))]
    alone = [a for a, others in zip(attempts, right, strict=True) if not others]
    if materials.truth or materials.critic is not None:
        said = iter(feedback.views(alone, materials))
    else:
        said = iter([View(student_prompt(a), None) for a in alone])
    return [
        View(student_prompt(a), sibling_message(a.problem, others[0].text))
        if others
        else next(said)
        for a, others in zip(attempts, right, strict=True)
    ]


register_context(
    Context(
        name="sibling",
        help="a sibling attempt that came out right, else feedback (SDPO, 2601.20802)",
        order=70,
        views=views,
        options=frozenset({"critic"}),
        needs_gold=True,
        needs_siblings=True,
    )
)
