"""Next-token distributions measured against each other, from hidden states; nothing is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from mlx_fd.losses import kernels
from mlx_fd.losses.chunks import part_by_part
from mlx_fd.losses.head import logit_head
from mlx_fd.losses.teacher import TopK
from mlx_fd.models.logit_transform import LogitSource

# In the place of -inf, where it is multiplied with a probability of 0.
_MIN_LOGPROB = -1e20


def token_log_probabilities(
    hidden: mx.array, head: LogitSource, tokens: mx.array, *, temperature: float, vocab: int
) -> tuple[mx.array, mx.array]:
    """Log-probabilities of tokens, and the entropies of the distributions they are of.

    Args:
        hidden: [N, d], after the final norm, where each token is predicted.
        head: as :func:`fused_linear_divergence` takes it.
        tokens: [N], below ``vocab``.
        temperature: T, above 0.
        vocab: V, the tokenizer's tokens; rows of the head beyond are padding.

    Returns:
        log softmax(z / T) of each token and the entropy of softmax(z / T), in nats, [N] each,
        float32; nothing is differentiable.
    """
    student = logit_head(head, vocab)

    def said(part: slice) -> tuple[mx.array, mx.array]:
        rows = student.logits(hidden[part]).astype(mx.float32) / temperature
        rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        picked = mx.take_along_axis(rows, tokens[part, None], axis=-1).squeeze(-1)
        # A logit of -inf has no probability, and adds nothing.
        return picked, -(mx.exp(rows) * mx.maximum(rows, _MIN_LOGPROB)).sum(axis=-1)

    logprobs, entropies = part_by_part(said, len(hidden), vocab, 4 + student.extra_arrays)
    return mx.stop_gradient(logprobs), mx.stop_gradient(entropies)


@dataclass(frozen=True)
class Compared:
    """What a student and a teacher say of the same N tokens: [N] each, float32, in nats.

    Attributes:
        logprobs: the student's log-probabilities of the tokens.
        entropy: of the student's distributions.
        teacher: the teacher's log-probabilities of the tokens.
        overlap: of the teacher's k likeliest tokens the share that the student's k hold as well.
        reverse_kl: KL(student || teacher).
    """

    logprobs: mx.array
    entropy: mx.array
    teacher: mx.array
    overlap: mx.array
    reverse_kl: mx.array


def compare_distributions(
    student: tuple[mx.array, LogitSource],
    teacher: tuple[mx.array, LogitSource],
    tokens: mx.array,
    *,
    k: int,
    temperature: float,
    vocab: int,
) -> Compared:
    """:func:`token_log_probabilities` of two models, and how near their distributions are.

    Each model's logits are made once, a chunk of tokens at a time; nothing is differentiable.

    Args:
        student: its hidden states [N, d] after the final norm, and its head.
        teacher: its hidden states [N, d_teacher], and its head.
        tokens: [N], below ``vocab``.
        k: how many of the likeliest tokens are compared; all of them where there are no more.
        temperature: T, above 0, that both models' logits are divided by.
        vocab: V, the tokens that the models share; rows of the heads beyond are padding.
    """
    heads = [logit_head(head, vocab) for _, head in (student, teacher)]
    hidden = student[0], teacher[0]
    k = min(k, vocab)

    def compared(part: slice) -> tuple[mx.array, ...]:
        found = []
        for states, head in zip(hidden, heads, strict=True):
            logits = head.logits(states[part]).astype(mx.float32) / temperature
            values, indices, total = kernels.top_k_rows(logits, k)
            found.append((logits - total[:, None], values - total[:, None], indices))
        (ours, least, _), (of_teacher, _, likeliest) = found
        both = mx.take_along_axis(ours, likeliest, axis=-1) >= least.min(axis=-1, keepdims=True)
        q = mx.exp(ours)
        # A logit of -inf has no probability, and adds nothing.
        plain = mx.maximum(ours, _MIN_LOGPROB)
        picked = [
            mx.take_along_axis(rows, tokens[part, None], axis=-1).squeeze(-1)
            for rows in (ours, of_teacher)
        ]
        return (
            picked[0],
            -(q * plain).sum(axis=-1),
            picked[1],
            both.astype(mx.float32).mean(axis=-1),
            mx.maximum((q * (plain - mx.maximum(of_teacher, _MIN_LOGPROB))).sum(axis=-1), 0),
        )

    arrays = 6 + max(head.extra_arrays for head in heads)
    return Compared(*map(mx.stop_gradient, part_by_part(compared, len(tokens), vocab, arrays)))


def top_k_gap(
    student_hidden: mx.array,
    student_head: LogitSource,
    teacher: TopK,
    *,
    kind: str,
    temperature: float,
    vocab: int,
    beta: float = 0.5,
) -> tuple[mx.array, mx.array]:
    """How far the divergence over a top k may be below that of the whole distributions.

    With p_t and q_t what teacher and student give to the tail, and p', q' their distributions in
    it, the chain rule of the KL says that what is missing is T^2 times::

        p_t KL(p' || q')                                                      forward
        q_t KL(q' || p')                                                      reverse
        beta p_t KL(p' || m') + (1 - beta) q_t KL(q' || m')                   jsd

    A token of the tail is no likelier than the k-th, p_k, so the first is at most
    p_t (log min(1, p_k / p_t) - min log q'). The last, with a = beta p_t and b = (1 - beta) q_t, is
    a + b times the information in which of the two a token came from: at most
    -a log(a / (a + b)) - b log(b / (a + b)). The reverse one has no bound, since p' may be next to
    0 where q' is not.

    Args:
        student_hidden: [N, d_student].
        student_head: the student's.
        teacher: the top k.
        kind: ``"forward"`` or ``"jsd"``; for ``"reverse"`` the bound is infinite.
        temperature: T.
        vocab: V.
        beta: of ``"jsd"``.

    Returns:
        The bound [N], and p_t [N], float32, exact to float32's rounding.
    """
    student = logit_head(student_head, vocab)

    def missing(part: slice) -> tuple[mx.array, mx.array]:
        rows = student.logits(student_hidden[part]).astype(mx.float32) / temperature
        chosen = teacher.indices[part]
        log_p = teacher.values[part] / temperature - teacher.log_sum_exp[part][:, None]
        tail = mx.maximum(1 - mx.exp(log_p).sum(axis=-1), 0)
        if chosen.shape[1] == vocab:
            return mx.zeros_like(tail), tail
        others = mx.put_along_axis(rows, chosen, mx.array(-math.inf), axis=-1)
        if kind == "jsd":
            of_student = mx.exp(mx.logsumexp(others, axis=-1) - mx.logsumexp(rows, axis=-1))
            a, b = beta * tail, (1 - beta) * of_student
            return _mixed(a, a + b) + _mixed(b, a + b), tail
        if kind == "forward":
            least = mx.put_along_axis(rows, chosen, mx.array(math.inf), axis=-1).min(axis=-1)
            spread = mx.logsumexp(others, axis=-1) - least
            likeliest = mx.minimum(log_p.min(axis=-1) - mx.log(tail), 0)
            bound = tail * mx.maximum(likeliest + spread, 0)
            return mx.where(tail > 0, bound, 0), tail
        return mx.full(tail.shape, math.inf), tail

    arrays = 5 + student.extra_arrays
    bounds, tails = part_by_part(missing, len(student_hidden), vocab, arrays)
    return temperature**2 * bounds, tails


def _mixed(part: mx.array, whole: mx.array) -> mx.array:
    """-part log(part / whole), 0 where there is no part."""
    return mx.where(part > 0, -part * mx.log(part / whole), 0)
