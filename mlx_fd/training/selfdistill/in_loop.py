"""Self-distillation within the loop: the student learns from the feedback on its own answers, too.

The student, which read nothing but the problem, is matched to itself reading what the expert made
of its answer. Where the expert revised it, that revision is the step-aligned critique: the expert
saw the answer and its own feedback, and nothing has to be written for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_fd.config import Method, TrainingOptions
from mlx_fd.feedback.stages import Finished
from mlx_fd.models.loading import Loaded
from mlx_fd.problems import prompts
from mlx_fd.problems.kinds import form_of
from mlx_fd.training.selfdistill.contexts import CONTEXTS, Attempt, View
from mlx_fd.training.selfdistill.learning import gradients, loss_value
from mlx_fd.training.selfdistill.reading import forward_teacher_and_student
from mlx_fd.training.selfdistill.teacher import adapter
from mlx_fd.training.selfdistill.token_weights import token_weights

# Forward KL to the student as it is, over the whole vocabulary.
_METHOD = Method(method="loop", objective="forward", self_teacher="current")


@dataclass(frozen=True)
class Lessons:
    """The student's answers in a batch, and what it reads as its own teacher.

    Attributes:
        attempts: its answers.
        views: one for each.
    """

    attempts: tuple[Attempt, ...]
    views: tuple[View, ...]


def lessons(finished: Sequence[Finished], context: str) -> Lessons:
    """What the student can learn from the expert's word on its answers.

    Args:
        finished: episodes whose first answers are the student's.
        context: one that can be made from an episode.
    """
    from_episode = CONTEXTS[context].from_episode
    assert from_episode is not None, context
    attempts, views = [], []
    for one in finished:
        message = from_episode(one)
        if message is not None:
            problem, answered = one.problem, one.judged.answered
            answer, right = answered.answer, answered.is_correct
            attempts.append(
                Attempt(
                    problem=problem,
                    question=problem.question,
                    tokens=answer.tokens,
                    text=answer.text,
                    final=answer.final,
                    correct=right,
                    opening=answer.opening,
                )
            )
            views.append(View(prompts.answer_prompt(problem.question, form_of(problem)), message))
    return Lessons(tuple(attempts), tuple(views))


def self_distillation_loss(
    student: Loaded, lessons: Lessons, training: TrainingOptions
) -> tuple[Any, float]:
    """The term that an update of the student gains.

    Args:
        student: as it is now, teacher and student in one.
        lessons: at least one answer.
        training: texts per forward pass, and gradient checkpointing.

    Returns:
        The mean divergence per token's gradient by the language model's trainable weights, and
        its value.
    """
    model = student.model
    stats = forward_teacher_and_student(
        student,
        adapter(model),
        [[attempt] for attempt in lessons.attempts],
        lessons.views,
        _METHOD,
        training.micro_batch,
    )
    weights = token_weights(stats, _METHOD, max(len(item.text.target) for item in stats))
    grads, matched = gradients(student, stats, weights, _METHOD, training)
    return grads, loss_value(weights, matched, _METHOD)
