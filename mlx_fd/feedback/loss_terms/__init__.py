"""The losses of a distillation step, one file each.

A loss is either on next-token distributions, and then says what each token of a text counts; all of
those that are enabled are computed in one pass over the vocabulary. Or it computes itself what it
is on each sample, from what the student and the expert made of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlx_fd import registry
from mlx_fd.registry import Entry, Registry

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_fd.config import LossOptions
    from mlx_fd.feedback.samples import Batch, Sample
    from mlx_fd.models.onward import Kept
    from mlx_fd.models.student import Student
    from mlx_fd.models.view import Forward


@dataclass(frozen=True)
class Forwarded:
    """What the student made of a batch.

    Attributes:
        student: the student.
        seen: its hidden states over all S tokens, [B, S, d] for each layer.
        final: the last one's where the texts' tokens are predicted, [B, T, d].
        batch: the samples, with what the expert made of them.
        options: the losses' options.
        kept: what its blocks kept of the samples, where other texts go on from there.
    """

    student: Student
    seen: Forward
    final: mx.array
    batch: Batch
    options: LossOptions
    kept: list[Kept] | None = None

    def at_text(self, hidden: mx.array) -> mx.array:
        """Hidden states [B, S, d] where the texts' tokens are predicted, [B, T, d]."""
        import mlx.core as mx

        return mx.take_along_axis(hidden, self.batch.positions[..., None], axis=1)


@dataclass(frozen=True, kw_only=True)
class Loss(Entry):
    """One loss. It has ``matches`` and ``token_weights``, or ``compute``.

    Attributes:
        count: what the loss's sum over some samples is divided by; 0: none of them has a part.
        matches: what the student's next-token distributions are compared with: the tokens that
            were written, or the expert's distributions.
        token_weights: what each of a sample's T tokens counts in that.
        compute: the loss's sum over each sample of a batch, [B], differentiable by the student.
        on_solutions: it is on solutions only, which are then learned from.
        needs_attention: it reads the attention of both models.
        trains_head: it teaches the score head; where no loss does, its score says nothing.
        phase: with ``loss_weights`` ``phases`` or ``both``, when it counts most; empty: it counts
            the same throughout.

    Raises:
        ValueError: it has neither or both of the two forms, or the name ``self``, which is that of
            self-distillation within the loop.
    """

    count: Callable[[Sequence[Sample]], float]
    matches: Literal["tokens", "teacher"] | None = None
    token_weights: Callable[[Sample], Sequence[float]] | None = None
    compute: Callable[[Forwarded], mx.array] | None = None
    on_solutions: bool = False
    needs_attention: bool = False
    trains_head: bool = False
    phase: Literal["correctness", "reasoning", ""] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "self":
            raise ValueError("the loss of student_context is called 'self'; choose another name")
        on_tokens = self.matches is not None and self.token_weights is not None
        if on_tokens == (self.compute is not None):
            raise ValueError(
                f"the loss {self.name!r} needs either matches and token_weights, or compute"
            )


LOSSES: Registry[Loss] = registry.LOSSES
register_loss = LOSSES.register


def count_tokens(samples: Sequence[Sample]) -> float:
    """All tokens of the samples' texts."""
    return float(sum(len(sample.target) for sample in samples))
