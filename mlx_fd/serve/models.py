"""The models that are served: a student, how it judges, and maybe an expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import UserError
from mlx_fd.models.thinking import ThinkingOptions

if TYPE_CHECKING:
    from mlx_fd.feedback.judge import Judge, ModelRef
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


@dataclass(frozen=True)
class Thoughts:
    """Who thinks before it writes.

    Attributes:
        student: ``"on"`` or ``"off"``; ``None``: as in its run, and no plain model does.
        expert: likewise.
        limit: the most tokens of a thought; ``None``: as in the run.
    """

    student: str | None = None
    expert: str | None = None
    limit: int | None = None

    def of_student(self, ref: ModelRef) -> ModelRef:
        """A student that thinks as it shall."""
        known = ref.thinking
        on = known.on if self.student is None else self.student == "on"
        return replace(ref, thinking=ThinkingOptions(on, self.limit or known.limit))

    @property
    def changes(self) -> dict[str, Any]:
        """What is other than in the run's configuration."""
        given = {
            "student_thinking": self.student,
            "expert_thinking": self.expert,
            "max_thinking_tokens": self.limit,
        }
        return {name: value for name, value in given.items() if value is not None}


AS_IN_THE_RUN = Thoughts()


def open_served(
    student: str,
    expert: str | None,
    thoughts: Thoughts = AS_IN_THE_RUN,
    *,
    speculate: int = 0,
) -> Served:
    """Load what is served; to be called on the thread that will run it.

    Args:
        student: a run directory (its best checkpoint), one of its checkpoints, or a model's name.
        expert: a model's name; ``None``: the student is alone.
        thoughts: who thinks.
        speculate: tokens that the student proposes at a time of what the expert writes; 0: none.

    Raises:
        UserError: nothing of that name, files are missing or damaged, the two do not fit, they need
            too much memory, one that shall think cannot, or the student cannot propose what the
            expert writes.
    """
    from mlx_fd.evaluation.target import Models, open_target
    from mlx_fd.feedback.criticism import feedback_request
    from mlx_fd.feedback.judge import Judge, locate_model, open_student, with_head
    from mlx_fd.feedback.pair import with_draft
    from mlx_fd.models.context import context_length
    from mlx_fd.models.speculative import check_draft
    from mlx_fd.problems.kinds import KINDS

    ref = thoughts.of_student(locate_model(student))
    found = None
    if expert is None:
        if speculate:
            raise UserError("--speculate: there is nobody to propose tokens to; add --expert NAME")
        if thoughts.expert is not None:
            raise UserError(
                f"--expert-thinking {thoughts.expert}: there is no expert; add --expert NAME"
            )
        judge = open_student(ref)
    else:
        target = open_target(student, expert, changes=thoughts.changes)
        if speculate:
            if not target.vocab:
                raise UserError(
                    "--speculate: expert and student have different tokenizers, so that the "
                    "student cannot propose the expert's tokens: leave it out"
                )
            check_draft(target.expert or target.student, target.student)
        pair = with_draft(Models(target).pair, speculate)
        found = pair.expert
        scoring = pair.student if target.checkpoint is not None else None
        judge = Judge(ref, pair.student_lm, scoring)
        if ref.run is None:
            judge = with_head(ref, pair.student_lm)
    known = ref.run is not None or judge.student is not None
    form = KINDS[judge.ref.answer_kind].form if known else None
    paths: dict[str, Path] = {STUDENT: ref.model}
    if found is not None:
        paths[EXPERT] = found.path
    context = {name: context_length(path) for name, path in paths.items()}
    feedback_request(judge.student_lm)  # a template that keeps no conversation is refused now
    return Served(judge, found, form, context)
