"""The models that are served: a student, how it judges, and maybe an expert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fd.errors import UserError

if TYPE_CHECKING:
    from mlx_fd.feedback.judge import Judge
    from mlx_fd.models.loading import Loaded
    from mlx_fd.problems.prompts import Form

STUDENT, EXPERT, CASCADE = "student", "expert", "cascade"


@dataclass(frozen=True)
class Served:
    """Models in memory.

    Attributes:
        judge: the student, which answers and judges.
        expert: whom it passes requests on to; ``None``: there is nobody.
        form: how the student was asked for answers in its training; ``None``: it is no run's.
        context: tokens that each model reads at most; ``None`` where its config does not say.
    """

    judge: Judge
    expert: Loaded | None
    form: Form | None
    context: dict[str, int | None]

    @property
    def student(self) -> Loaded:
        """The student's language model."""
        return self.judge.student_lm

    @property
    def scores(self) -> bool:
        """Whether the student has a trained score head."""
        return self.judge.student is not None and self.judge.ref.scores

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked; no cascade of a plain model that is alone."""
        return (
            *((CASCADE,) if self.scores or self.expert is not None else ()),
            STUDENT,
            *((EXPERT,) if self.expert is not None else ()),
        )

    def model(self, who: str) -> Loaded:
        """The student's or the expert's language model."""
        if who == STUDENT:
            return self.student
        assert self.expert is not None
        return self.expert


def open_served(student: str, expert: str | None) -> Served:
    """Load what is served; to be called on the thread that will run it.

    Args:
        student: a run directory (its best checkpoint), one of its checkpoints, or a model's name.
        expert: a model's name; ``None``: the student is alone.

    Raises:
        UserError: nothing of that name, files are missing or damaged, the two do not fit, they need
            too much memory, or one of them thinks.
    """
    from mlx_fd.evaluation.target import Models, open_target
    from mlx_fd.feedback.episode import feedback_request
    from mlx_fd.feedback.judge import Judge, locate_model, open_student
    from mlx_fd.models.context import context_length
    from mlx_fd.problems.kinds import KINDS

    ref = locate_model(student)
    if ref.thinking.on:
        raise UserError(
            f"{student}: this student was trained to think before its feedback, and the server "
            "does not serve thoughts; use mlx-fd feedback"
        )
    found = None
    if expert is None:
        judge = open_student(ref)
    else:
        target = open_target(student, expert)
        pair = Models(target).pair
        found = pair.expert
        if found.thinking is not None and found.thinking.on:
            raise UserError(
                f"{student}: the run's expert thinks before it answers (expert_thinking), and the "
                "server does not serve thoughts; serve the student without --expert"
            )
        scoring = pair.student if target.checkpoint is not None else None
        judge = Judge(ref, pair.student_lm, scoring)
    form = KINDS[ref.answer_kind].form if ref.run is not None else None
    paths: dict[str, Path] = {STUDENT: ref.model}
    if found is not None:
        paths[EXPERT] = found.path
    context = {name: context_length(path) for name, path in paths.items()}
    feedback_request(judge.student_lm)  # a template that keeps no conversation is refused now
    return Served(judge, found, form, context)
