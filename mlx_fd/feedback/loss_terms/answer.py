"""The final answer of a solution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Loss, register_loss

if TYPE_CHECKING:
    from mlx_fd.feedback.samples import Sample


def token_weights(sample: Sample) -> Sequence[float]:
    """The tokens that write the final answer."""
    return [float(writes) for writes in sample.answer] or [0.0] * len(sample.target)


def count(samples: Sequence[Sample]) -> float:
    """Solutions with a final answer."""
    return float(sum(any(sample.answer) for sample in samples))


register_loss(
    Loss(
        name="answer",
        help="cross-entropy on the tokens of a right solution's final answer",
        order=50,
        matches="tokens",
        token_weights=token_weights,
        count=count,
        on_solutions=True,
        phase="correctness",
    )
)
