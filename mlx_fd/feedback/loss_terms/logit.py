"""The student's next-token distributions beside the expert's, on feedback and solutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Loss, register_loss

if TYPE_CHECKING:
    from mlx_fd.feedback.samples import Sample


def token_weights(sample: Sample) -> Sequence[float]:
    """All tokens alike; with two tokenizers, those that both models have there."""
    return [float(known) for known in sample.matched] or [1.0] * len(sample.target)


def count(samples: Sequence[Sample]) -> float:
    """The tokens that count."""
    return math.fsum(weight for sample in samples for weight in token_weights(sample))


register_loss(
    Loss(
        name="logit",
        help="divergence of the next-token distributions from the expert's (kl, loss_temperature)",
        order=40,
        matches="teacher",
        token_weights=token_weights,
        count=count,
    )
)
