"""What was learned from failing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_fd.problems import Problem
from mlx_fd.problems.sources import SOURCES
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
from mlx_fd.training.selfdistill.playbook import Playbook

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def reflection_message(
    problem: Problem, lessons: Sequence[str], attempt: str, reflection: str, solution: str
) -> str:
    """The question with what was learned from failing at it, and at others.

    Args:
        problem: whose question it is.
        lessons: of the playbook.
        attempt: the failed attempt; empty: it did not fail.
        reflection: on that attempt.
        solution: an earlier right solution of this very problem; empty: there is none.
    """
    parts = []
    if lessons:
        parts.append("Lessons from earlier mistakes:\n" + "\n".join(f"- {x}" for x in lessons))
    if attempt:
        parts.append(f"A failed attempt of yours:\n{quoted(attempt)}")
        parts.append(f"Your reflection on it:\n{quoted(reflection)}")
    if solution:
        parts.append(f"An earlier solution of yours that was right:\n{quoted(solution)}")
    return message(problem, *parts)


def lessons() -> list[str]:
    """The lessons that true reflections give, one for each kind of error."""
    return list(_lessons().values())


def _lessons() -> dict[str, str]:
    """For each kind of error that a source knows, its lesson."""
    known = (source.truth for source in SOURCES.values() if source.truth is not None)
    return {kind: text for truth in known for kind, text in truth.lessons.items()}


def lesson(reflection: str) -> str:
    """The lesson of a reflection: its last sentence; a general one where it names a known slip."""
    for kind, text in _lessons().items():
        if f": {kind}." in reflection:
            return text
    sentences = _SENTENCE_END.split(quoted(reflection).replace("\n", " "))
    return sentences[-1][:200]


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """Reflection on the failure, lessons of earlier ones, earlier solutions (Resd, 2605.12741)."""
    from mlx_fd.training.selfdistill.critics import reflections

    lessons = [lesson.text for lesson in materials.playbook.lessons]
    notes = iter(reflections([a for a in attempts if not a.correct], materials))
    found = []
    for attempt in attempts:
        solution = materials.playbook.solutions.get(attempt.problem.id, "")
        if not attempt.correct:
            note = next(notes)
            text = reflection_message(attempt.problem, lessons, attempt.text, note, solution)
            found.append(View(student_prompt(attempt), text, note=note))
        elif lessons or solution:
            text = reflection_message(attempt.problem, lessons, "", "", solution)
            found.append(View(student_prompt(attempt), text))
        else:
            found.append(View(student_prompt(attempt), None))
    return found


def remember(playbook: Playbook, attempts: Sequence[Attempt], views: Sequence[View]) -> Playbook:
    """The playbook after a round of the context ``reflection``.

    Args:
        playbook: what the round began with.
        attempts: its attempts.
        views: what :func:`views` made of them.
    """
    lessons = [
        lesson(view.note)
        for attempt, view in zip(attempts, views, strict=True)
        if not attempt.correct and view.note
    ]
    right = {attempt.problem.id: attempt.text for attempt in attempts if attempt.correct}
    return playbook.after(lessons, right)


register_context(
    Context(
        name="reflection",
        help="reflection on the failure, lessons of earlier ones, earlier solutions (Resd, "
        "2605.12741)",
        order=80,
        views=views,
        options=frozenset({"critic", "critic_sees"}),
        needs_gold=True,
        remember=remember,
    )
)
