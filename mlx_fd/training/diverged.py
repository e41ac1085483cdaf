"""A student that is lost: what it computes is not finite any more, and the run ends unsaved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.feedback.stages import StudentFeedback
from mlx_fd.models import ranks
from mlx_fd.models.student import Student


def check_finite(losses: Mapping[str, float], batch: int, config: Config) -> None:
    """Stop a run whose student is lost, before its state is saved.

    Args:
        losses: the student's, by name.
        batch: batches done so far; 0: before any training.
        config: the run's.

    Raises:
        UserError: a loss is not finite.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            raise diverged(f"{name} loss is", batch, config)


def check_weights(student: Student, batch: int, config: Config) -> None:
    """Stop a run whose student could not be read back, before it is saved.

    Args:
        student: as it is to be saved.
        batch: batches done so far.
        config: the run's.

    Raises:
        UserError: a weight that trains is not finite.
    """
    weights = tree_flatten(student.trainable_parameters())
    if not mx.stack([mx.isfinite(array).all() for _, array in weights]).all().item():
        raise diverged("weights are", batch, config)


def diverged(what: str, batch: int, config: Config) -> UserError:
    """What ends a run whose student is lost.

    Args:
        what: of the student's is not finite, with its verb: ``"weights are"``.
        batch: batches done so far; 0: before any training.
        config: the run's; its learning rates are named.
    """
    if batch == 0:
        whose = "student" if config.self_distils else "expert or the student"
        return UserError(
            f"the student's {what} not finite before any training: the weights of the {whose} "
            "are not whole; fetch or convert them again."
        )
    training = config.training
    advice = (
        "lower learning rates "
        f"(--lora-rate {training.lora_rate:g}, --score-rate {training.score_rate:g}, "
        f"--projection-rate {training.projection_rate:g} were too high)"
    )
    if config.self_distils:
        advice = f"a lower learning rate (--lora-rate {training.lora_rate:g} was too high)"
    return UserError(
        f"the student diverged in batch {batch}: its {what} not finite any more. The "
        f"checkpoints before it are whole. Begin a new run with {advice} or a smaller "
        "--max-grad-norm."
    )


def check_feedback(given: Sequence[StudentFeedback], batch: int, config: Config) -> None:
    """Stop a run whose student is lost, before its rows are written; all ranks raise."""
    numbers = [(one.logprob, one.head_score) for one in given]
    for logprob, score in ranks.gather(numbers):
        if not math.isfinite(logprob):
            raise diverged("log-probabilities are", batch, config)
        if score is not None and not math.isfinite(score):
            raise diverged("score is", batch, config)
