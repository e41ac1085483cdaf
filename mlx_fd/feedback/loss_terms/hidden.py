"""The student's hidden states beside the expert's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Forwarded, Loss, register_loss

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_fd.feedback.samples import Sample


def compute(made: Forwarded) -> mx.array:
    """Of each sample 1 - cosine of the projected mean states, averaged over layers."""
    from mlx_fd.losses.hidden import hidden_alignment_rows

    layers = made.seen.layers
    if made.options.hidden_layers == "last":
        layers = layers[-1:]
    return hidden_alignment_rows(
        [made.at_text(layer) for layer in layers],
        made.batch.expert_pooled,
        made.batch.mask,
        made.student.projection,
    )


def count(samples: Sequence[Sample]) -> float:
    """Samples."""
    return float(len(samples))


register_loss(
    Loss(
        name="hidden",
        help="1 - cosine of the mean hidden states, layer by layer, through a learned projection",
        order=20,
        compute=compute,
        count=count,
    )
)
