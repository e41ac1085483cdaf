"""The student's attention beside the expert's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_fd.feedback.loss_terms import Forwarded, Loss, count_tokens, register_loss

if TYPE_CHECKING:
    import mlx.core as mx


def compute(made: Forwarded) -> mx.array:
    """Of each sample the sum over tokens of the divergence of attention, averaged over layers."""
    from mlx_fd.losses.attention import attention_matching_rows
    from mlx_fd.models.attention_taps import log_attention

    batch, options = made.batch, made.options
    last = options.hidden_layers == "last"
    blocks = made.seen.attention[-1:] if last else made.seen.attention
    return attention_matching_rows(
        [log_attention(calls, positions=batch.positions) for calls in blocks],
        batch.expert_attention,
        batch.mask,
        heads=options.attention_heads,
    )


register_loss(
    Loss(
        name="attention",
        help="divergence of the attention from the expert's, layer by layer",
        order=70,
        compute=compute,
        count=count_tokens,
        needs_attention=True,
        phase="reasoning",
    )
)
