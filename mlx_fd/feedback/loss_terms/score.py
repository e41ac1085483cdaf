"""The score head's score beside the one that the expert wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Forwarded, Loss, register_loss

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_fd.feedback.samples import Sample


def compute(made: Forwarded) -> mx.array:
    """The sum over samples of the squared distance of the two scores."""
    from mlx_fd.losses.score import score_loss

    batch = made.batch
    total, _ = score_loss(made.student.score(_scored(made)), batch.scores, batch.score_mask)
    return total


def _scored(made: Forwarded) -> mx.array:
    """The final hidden states [B, d] that the score head reads."""
    import mlx.core as mx

    if made.student.score_at == "prompt":
        return made.final[:, 0]
    last = made.batch.mask.sum(axis=1).astype(mx.int32) - 1
    return mx.take_along_axis(made.final, last[:, None, None], axis=1).squeeze(1)


def count(samples: Sequence[Sample]) -> float:
    """Samples with a score that could be read."""
    return float(sum(sample.expert_score is not None for sample in samples))


register_loss(
    Loss(
        name="score",
        help="squared distance of the score head's score from the expert's",
        order=30,
        compute=compute,
        count=count,
        phase="correctness",
    )
)
