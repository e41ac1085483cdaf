"""Cross entropy of the feedback's tokens under the student: true teacher forcing."""

from __future__ import annotations

import mlx.core as mx


def language_model_loss(
    logits: mx.array, targets: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    """Sum of -log p(target) over the valid tokens.

    Args:
        logits: [B, T, V], any float type; V may be padded beyond the tokenizer, and all of it takes
            part, as it does when the student generates.
        targets: [B, T], integer tokens in [0, V); where the mask is 0, anything.
        mask: [B, T], 1 (true) where the token counts.

    Returns:
        The sum and the number of valid tokens, float32.
    """
    valid = mask.astype(mx.bool_)
    safe = mx.where(valid[..., None], logits, 0).astype(mx.float32)
    # At 1e4 a float32 has three decimals: without the shift the logarithm below drowns.
    safe = safe - mx.stop_gradient(safe.max(axis=-1, keepdims=True))
    wanted = mx.where(valid, targets, 0)[..., None]
    picked = mx.take_along_axis(safe, wanted, axis=-1).squeeze(-1)
    losses = mx.logsumexp(safe, axis=-1) - picked
    return mx.where(valid, losses, 0).sum(), valid.astype(mx.float32).sum()
