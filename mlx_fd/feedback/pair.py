"""Expert and student in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student
from mlx_fd.runs.plan import Plan


def open_pair(plan: Plan, projection: int | None = None) -> Any:
    """Load the models of a plan.

    Args:
        plan: of the run.
        projection: size of the hidden states that the projection was made for; ``None``: the
            expert's.

    Returns:
        The :class:`mlx_fd.feedback.pair.Pair`, the student with fresh LoRA and heads.
    """
    from mlx_fd.feedback.pair import Pair
    from mlx_fd.models import taps
    from mlx_fd.models.loading import load_pair
    from mlx_fd.models.student import make_student

    options = plan.config.models
    expert, base = load_pair(plan.expert_path, plan.student_path, dequantize=options.dequantize)
    width = projection or taps.width(expert.model)
    student = make_student(base.model, width, options, plan.config.episode.seed)
    # One tokenizer for both: they were compared token by token, and so read the same prompts.
    student_lm = dataclasses.replace(
        base, model=student.model, tokenizer=expert.tokenizer, vocab=plan.vocab
    )
    expert = dataclasses.replace(expert, vocab=plan.vocab)
    return Pair(expert, student, student_lm, plan.vocab)


@dataclass(frozen=True)
class Pair:
    """The two models of a run.

    Attributes:
        expert: answers, gives feedback, merges, revises and criticises itself.
        student: the student's trainable parts around its language model.
        student_lm: that language model with the expert's tokenizer, so that both read the same
        tokens.
        vocab: tokens the two share (padding of either vocabulary is left out).
    """

    expert: Loaded
    student: Student
    student_lm: Loaded
    vocab: int
