"""A demonstration of how to answer."""

from __future__ import annotations

from collections.abc import Sequence

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


def demonstration_message(problem: Problem, demonstration: str) -> str:
    """The question with a demonstration of how to answer it."""
    return message(
        problem,
        f"This is how a good answer to it looks:\n{quoted(demonstration)}",
        "Now answer in the same manner.",
    )


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """A demonstration for this very question (SDFT, 2601.19897)."""
    shown = (materials.demonstrations.get(a.problem.id, a.problem.solution) for a in attempts)
    return [
        View(student_prompt(a), demonstration_message(a.problem, text))
        for a, text in zip(attempts, shown, strict=True)
    ]


register_context(
    Context(
        name="demonstration",
        help="a demonstration for this very question (SDFT, 2601.19897)",
        order=60,
        views=views,
        needs_solution=True,
    )
)
