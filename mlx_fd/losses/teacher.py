"""What is kept of an expert's next-token distributions: its likeliest tokens, or given ones."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_fd.losses import kernels
from mlx_fd.losses.chunks import part_by_part
from mlx_fd.losses.head import logit_head
from mlx_fd.models.logit_transform import LogitSource


@dataclass(frozen=True)
class TopK:
    """The teacher at k tokens, its likeliest or others, of N positions; the sum tells the rest.

    Attributes:
        values: [N, k], their logits, before the temperature.
        indices: [N, k], their tokens, all different in a row.
        log_sum_exp: [N], of the logits of the whole vocabulary *divided by the temperature*.
    """

    values: mx.array
    indices: mx.array
    log_sum_exp: mx.array


def one_hot(targets: mx.array) -> TopK:
    """A teacher that is sure of each token [N]: the forward divergence is the cross entropy.

    At temperature 1, that is.
    """
    nothing = mx.zeros(targets.shape)
    return TopK(nothing[:, None], targets[:, None], nothing)


def teacher_top_k(
    hidden: mx.array,
    head: LogitSource,
    *,
    k: int,
    temperature: float,
    vocab: int,
    among: mx.array | None = None,
) -> TopK:
    """The k likeliest tokens of a teacher, logits a chunk at a time.

    Args:
        hidden: [N, d_teacher], after the final norm.
        head: the teacher's, as :func:`fused_linear_divergence` takes it.
        k: how many; all of them where there are no more.
        temperature: T, above 0.
        vocab: V, the teacher's real tokens, or those that the models share.
        among: [M], the only tokens that are looked at, all different; ``None``: all.

    Returns:
        The top k; where it is ``among`` some tokens, ``indices`` count in these. The log-sum-exp is
        over all V either way.
    """
    teacher = logit_head(head, vocab)

    def likeliest(part: slice) -> tuple[mx.array, ...]:
        logits = teacher.logits(hidden[part]).astype(mx.float32) / temperature
        if among is None:
            values, indices, log_sum_exp = kernels.top_k_rows(logits, min(k, vocab))
        else:
            values, indices, _ = kernels.top_k_rows(logits[:, among], min(k, len(among)))
            log_sum_exp = mx.logsumexp(logits, axis=-1)
        return values * temperature, indices, log_sum_exp

    arrays = 3 + teacher.extra_arrays + (among is not None)
    return TopK(*part_by_part(likeliest, len(hidden), vocab, arrays))


def teacher_at(
    hidden: mx.array, head: LogitSource, tokens: mx.array, *, temperature: float, vocab: int
) -> TopK:
    """What a teacher says of chosen tokens, logits a chunk at a time.

    Args:
        hidden: [N, d_teacher], after the final norm.
        head: the teacher's, as :func:`fused_linear_divergence` takes it.
        tokens: [N, k], below ``vocab``, all different in a row.
        temperature: T, above 0.
        vocab: V, the real tokens that the models share.
    """
    teacher = logit_head(head, vocab)

    def chosen(part: slice) -> tuple[mx.array, mx.array]:
        logits = teacher.logits(hidden[part]).astype(mx.float32)
        values = mx.take_along_axis(logits, tokens[part], axis=-1)
        return values, mx.logsumexp(logits / temperature, axis=-1)

    arrays = 3 + teacher.extra_arrays
    values, log_sum_exp = part_by_part(chosen, len(hidden), vocab, arrays)
    return TopK(values, tokens, log_sum_exp)
