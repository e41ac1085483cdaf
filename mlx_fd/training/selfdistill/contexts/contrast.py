"""Right and wrong attempts as hints."""

from __future__ import annotations

import random
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
    siblings_of,
    student_prompt,
)


def hint_message(problem: Problem, attempt: str) -> str:
    """The question with another attempt at it, of which is not said whether it is right."""
    return message(problem, f"Another attempt at it:\n{quoted(attempt)}")


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """A right sibling as hint, and wrong ones in the same words (RLCSD, 2606.11709)."""
    found = []
    for place, attempt in enumerate(attempts):
        right = siblings_of(attempts, place, correct=True)
        # As published, a wrong attempt that comes to no answer is no hint.
        wrong = [a for a in siblings_of(attempts, place, correct=False) if a.final is not None]
        if not right or not wrong:
            found.append(View(student_prompt(attempt), None))
            continue
        # By its place among the attempts at its problem: on several machines the others differ.
        number = sum(other.problem.id == attempt.problem.id for other in attempts[:place])
        rng = random.Random(f"contrast/{materials.seed}/{attempt.problem.id}/{number}")
        drawn = rng.sample(wrong, min(materials.most_wrong, len(wrong)))
        found.append(
            View(
                student_prompt(attempt),
                hint_message(attempt.problem, rng.choice(right).text),
                tuple(hint_message(attempt.problem, other.text) for other in drawn),
            )
        )
    return found


register_context(
    Context(
        name="contrast",
        help="a right sibling as hint, and wrong ones in the same words (RLCSD, 2606.11709)",
        order=100,
        views=views,
        options=frozenset({"wrong_hints"}),
        needs_gold=True,
        needs_siblings=True,
        gives_wrong_hints=True,
    )
)
