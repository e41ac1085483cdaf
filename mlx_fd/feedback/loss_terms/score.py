"""The score head's score beside the one that the expert wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Forwarded, Loss, register_loss

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_fd.feedback.samples import Sample


def compute(made: Forwarded) -> mx.array:
    """Of each sample the squared distance of the two scores."""
    from mlx_fd.losses.score import score_rows

    batch = made.batch
    return score_rows(made.student.score(_scored(made)), batch.scores, batch.score_mask)


def _scored(made: Forwarded) -> mx.array:
    """The final hidden states [B, d] that the score head reads; any where there is no score."""
    import mlx.core as mx

    if made.student.score_at == "prompt":
        return made.final[:, 0]
    if made.student.score_at == "own":
        return _at_own_end(made)
    last = made.batch.mask.sum(axis=1).astype(mx.int32) - 1
    return mx.take_along_axis(made.final, last[:, None, None], axis=1).squeeze(1)


def _at_own_end(made: Forwarded) -> mx.array:
    """The states [B, d] where the last token of the student's own feedback is predicted.

    The expert's feedback, which has the score in it, is another text, so this is a pass of its own;
    forward alone, for a gradient through it brought nothing (docs/log.md).
    """
    import mlx.core as mx

    from mlx_fd.models.onward import go_on

    batch = made.batch
    states = mx.zeros((len(batch.tokens), made.final.shape[-1]), made.final.dtype)
    if batch.own is None:
        return states
    own, view = batch.own, made.student.view
    if made.kept is None or own.begun is None:
        final = view.forward(own.tokens).final
    else:
        final = go_on(view, made.kept, own.rows, own.begun, own.tokens)
    read = mx.take_along_axis(final, own.ends[:, None, None], axis=1).squeeze(1)
    return states.at[own.rows].add(mx.stop_gradient(read))


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
        trains_head=True,
        phase="correctness",
    )
)
