"""The plain MLX-graph definition of the logit losses, which the engine is held to.

From whole logits, differentiated by MLX. Nothing trains with these: the engine,
:mod:`mlx_fd.losses.divergence`, does without [tokens, vocabulary] arrays. The tests compare it with
these few lines, and so does scripts/bench_losses.py.
"""

from __future__ import annotations

import math

import mlx.core as mx

# A row of equal logits has no spread to divide by.
_MIN_VARIANCE = 1e-12


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


def logit_loss(
    student_logits: mx.array,
    teacher_logits: mx.array,
    mask: mx.array,
    *,
    kl: str,
    temperature: float,
    vocab: int,
    standardize: bool,
) -> tuple[mx.array, mx.array]:
    """Sum over the valid tokens of T^2 times the divergence of the softened distributions.

    ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher), ``jsd`` the
    Jensen-Shannon divergence, at most T^2 ln 2. T^2 keeps the gradient's size as T changes
    (Hinton et al., arXiv 1503.02531). With ``standardize`` each row is z-scored over the shared
    vocabulary before it is divided by T (Sun et al., arXiv 2403.01427; population variance).

    Args:
        student_logits: [B, T, V_student], any float type.
        teacher_logits: [B, T, V_teacher]; no gradient flows into them.
        mask: [B, T], 1 (true) where the token counts.
        kl: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        temperature: T, above 0.
        vocab: real tokens that the two models share; logits beyond them are padding, and cut off.
        standardize: z-score the rows first.

    Returns:
        The sum and the number of valid tokens, float32.

    Raises:
        ValueError: an unknown ``kl``, or logits narrower than ``vocab``.
    """
    if kl not in ("forward", "reverse", "jsd"):
        raise ValueError(f'kl must be "forward", "reverse" or "jsd", not {kl!r}')
    if vocab > min(student_logits.shape[-1], teacher_logits.shape[-1]):
        raise ValueError(
            f"vocab = {vocab}, but the logits are {student_logits.shape[-1]} (student) and "
            f"{teacher_logits.shape[-1]} (teacher) wide"
        )
    valid = mask.astype(mx.bool_)

    def log_probabilities(logits: mx.array) -> mx.array:
        rows = mx.where(valid[..., None], logits[..., :vocab], 0).astype(mx.float32)
        if standardize:
            rows = rows - rows.mean(axis=-1, keepdims=True)
            variance = mx.square(rows).mean(axis=-1, keepdims=True)
            rows = rows * mx.rsqrt(mx.maximum(variance, _MIN_VARIANCE))
        # At 1e4 a float32 has three decimals: without the shift the logarithm below drowns.
        rows = (rows - mx.stop_gradient(rows.max(axis=-1, keepdims=True))) / temperature
        return rows - mx.logsumexp(rows, axis=-1, keepdims=True)

    student = log_probabilities(student_logits)
    teacher = log_probabilities(mx.stop_gradient(teacher_logits))
    if kl == "forward":
        losses = _kl(teacher, student)
    elif kl == "reverse":
        losses = _kl(student, teacher)
    else:
        middle = mx.logaddexp(student, teacher) - math.log(2)
        losses = (_kl(teacher, middle) + _kl(student, middle)) / 2
    total = mx.where(valid, losses, 0).sum() * temperature**2
    return total, valid.astype(mx.float32).sum()


def _kl(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) of log-probabilities over the last axis."""
    return (mx.exp(p) * (p - q)).sum(axis=-1)
