"""The steps of a solution before its final answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Loss, register_loss

if TYPE_CHECKING:
    from mlx_fd.feedback.samples import Sample


def token_weights(sample: Sample) -> Sequence[float]:
    """What each token counts in its step."""
    return list(sample.steps) or [0.0] * len(sample.target)


def count(samples: Sequence[Sample]) -> float:
    """Steps."""
    return math.fsum(weight for sample in samples for weight in sample.steps)


register_loss(
    Loss(
        name="reasoning",
        help="divergence from the expert's distributions on a right solution's steps, all alike",
        order=60,
        matches="teacher",
        token_weights=token_weights,
        count=count,
        on_solutions=True,
        phase="reasoning",
    )
)
