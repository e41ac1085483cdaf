"""The reference solution."""

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
from mlx_fd.training.selfdistill.materials import reference_of


def reference_message(problem: Problem, solution: str) -> str:
    """The question with a reference solution."""
    return message(
        problem,
        f"A solution known to be right:\n{quoted(solution)}",
        "Understand it, then give your own; do not mention it.",
    )


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """The reference solution (OPSD, arXiv 2601.18734)."""
    return [
        View(
            student_prompt(a),
            reference_message(a.problem, reference_of(a.problem, materials)),
        )
        for a in attempts
    ]


register_context(
    Context(
        name="reference",
        help="the reference solution (OPSD, arXiv 2601.18734)",
        order=20,
        views=views,
        options=frozenset({"reference_style"}),
        needs_solution=True,
    )
)
