"""The student's next-token distributions beside the expert's, on feedback and solutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Loss, count_tokens, register_loss

if TYPE_CHECKING:
    from mlx_fd.feedback.samples import Sample


def token_weights(sample: Sample) -> Sequence[float]:
    """All tokens alike."""
    return [1.0] * len(sample.target)


register_loss(
    Loss(
        name="logit",
        help="divergence of the next-token distributions from the expert's (kl, loss_temperature)",
        order=40,
        matches="teacher",
        token_weights=token_weights,
        count=count_tokens,
    )
)
