"""What the self-teacher sees: the first axis of self-distillation, one file for each context.

Student and self-teacher are one model. It writes an attempt from the question alone; then it reads
the same attempt, token for token, once more, after a message that tells more. What it would have
written there is what is learned. A context makes that message: attempts and :class:`Materials` in,
one :class:`View` an attempt out.

Attempts may come from one problem or from many; siblings are attempts at the same problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_fd import registry
from mlx_fd.errors import UserError
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import form_of
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.registry import Entry, Registry
from mlx_fd.training.selfdistill.materials import Attempt, Materials, quoted
from mlx_fd.training.selfdistill.playbook import Playbook

if TYPE_CHECKING:
    from mlx_fd.feedback.stages import Finished

__all__ = [
    "CONTEXTS",
    "Attempt",
    "Context",
    "Materials",
    "Playbook",
    "View",
    "describe",
    "message",
    "quoted",
    "register_context",
    "siblings_of",
    "student_prompt",
]


@dataclass(frozen=True)
class View:
    """The user's messages before one attempt. Its tokens follow each of them unchanged.

    Attributes:
        student: the message that the student read.
        teacher: the one that the self-teacher reads; ``None``: this attempt teaches nothing.
        wrong: the teacher's message with a wrong hint in the right one's place, for contrast.
        note: what was written on the attempt for this (a rewrite, a feedback, a reflection).
    """

    student: str
    teacher: str | None
    wrong: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Context(Entry):
    """One thing that a self-teacher can read beside the problem.

    Attributes:
        views: attempts and materials to one view for each attempt.
        options: those of a run that it is made with (``critic``, ``critic_sees``,
            ``reference_style``, ``wrong_hints``); the command line refuses the others.
        from_episode: within the loop, what the student reads of an episode as its own teacher;
            ``None`` of an episode: it teaches nothing. ``None``: the loop has no such context.
        needs_siblings: it shows other attempts at the same problem.
        needs_critic: it wants a critic, or the truth.
        needs_gold: it is made of what is right and wrong, which has to be known.
        needs_solution: it shows a reference solution.
        gives_wrong_hints: its views have wrong hints beside the right one.
        remember: the playbook after a batch, from the one before it; ``None``: it stays empty.
    """

    views: Callable[[Sequence[Attempt], Materials], list[View]]
    options: frozenset[str] = frozenset()
    from_episode: Callable[[Finished], str | None] | None = None
    needs_siblings: bool = False
    needs_critic: bool = False
    needs_gold: bool = False
    needs_solution: bool = False
    gives_wrong_hints: bool = False
    remember: Callable[[Playbook, Sequence[Attempt], Sequence[View]], Playbook] | None = None


CONTEXTS: Registry[Context] = registry.CONTEXTS
register_context = CONTEXTS.register


def message(problem: Problem, *parts: str) -> str:
    """A problem with what else the self-teacher reads, and how an answer has to look."""
    return answer_prompt("\n\n".join([problem.question.strip(), *parts]), form_of(problem))


def student_prompt(attempt: Attempt) -> str:
    """What the student read before its attempt."""
    return answer_prompt(attempt.question, form_of(attempt.problem))


def siblings_of(attempts: Sequence[Attempt], place: int, *, correct: bool) -> list[Attempt]:
    """The other attempts at the problem of the one at ``place`` that are right, or wrong."""
    own = attempts[place]
    return [
        other
        for k, other in enumerate(attempts)
        if k != place and other.problem.id == own.problem.id and other.correct == correct
    ]


def describe(name: str) -> str:
    """A context in one sentence.

    Raises:
        UserError: there is no such context.
    """
    if name not in CONTEXTS:
        raise UserError(f"there is no context {name!r}, only {', '.join(CONTEXTS)}")
    text = CONTEXTS[name].help
    return f"{text[0].upper()}{text[1:]}."
