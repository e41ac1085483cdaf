"""No context: what self-distillation gives when nothing is told."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.training.selfdistill.contexts import (
    Attempt,
    Context,
    Materials,
    View,
    register_context,
    student_prompt,
)


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """Nothing more than the student saw."""
    return [View(student_prompt(a), student_prompt(a)) for a in attempts]


register_context(
    Context(
        name="none",
        help="nothing more than the student saw",
        order=10,
        views=views,
    )
)
