"""The attempt itself, mended from its first wrong step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import is_right, read_final
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


def critique_message(problem: Problem, rewrite: str) -> str:
    """The question with an attempt that a critic has mended."""
    return message(
        problem,
        f"Your attempt, kept as it was up to its first wrong step and mended from there:\n"
        f"{quoted(rewrite)}",
        "Give the solution; do not mention the attempt.",
    )


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """The attempt itself, right steps verbatim, mended from its first wrong one (2606.11173)."""
    from mlx_fd.training.selfdistill.critics import rewrites

    return [
        View(
            student_prompt(a),
            critique_message(a.problem, text) if text else None,
            note=text,
        )
        for a, text in zip(attempts, rewrites(attempts, materials), strict=True)
    ]


def from_episode(finished: Finished) -> str | None:
    """The expert's revision where it is right, or the answer where it was good enough to stay."""
    problem = finished.problem
    rewrite = finished.revised or finished.judged.answered.answer.text
    if not is_right(read_final(rewrite, problem), problem):
        return None
    return critique_message(problem, rewrite)


register_context(
    Context(
        name="step-critique",
        help="the attempt itself, right steps verbatim, mended from its first wrong one "
        "(2606.11173)",
        order=30,
        views=views,
        options=frozenset({"critic", "critic_sees", "reference_style"}),
        needs_gold=True,
        from_episode=from_episode,
        needs_critic=True,
    )
)
