"""The next tokens themselves, as in any language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Loss, count_tokens, register_loss

if TYPE_CHECKING:
    from mlx_fd.feedback.samples import Sample


def token_weights(sample: Sample) -> Sequence[float]:
    """All tokens alike; none of a text that the student wrote itself."""
    return [0.0 if sample.on_policy else 1.0] * len(sample.target)


def count(samples: Sequence[Sample]) -> float:
    """The tokens that count."""
    return count_tokens([sample for sample in samples if not sample.on_policy])


register_loss(
    Loss(
        name="lm",
        help="cross-entropy on the tokens of the expert's feedback and of right final answers",
        order=10,
        matches="tokens",
        token_weights=token_weights,
        count=count,
    )
)
