"""The row functions of the distillation engine, written with MLX's own operations.

They run on every backend, and are what the Metal and CUDA kernels must equal. Each gives its
gradient in the same pass as its value, in closed form: nothing here is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_fd.models import cpu_math
from mlx_fd.models.backend import backend
from mlx_fd.models.logit_transform import LogitTransform

# Stands in for a logit of -inf, so that 0 * log 0 is 0: far below any logit, and still a number.
_MIN_LOGIT = -1e20
# Stands in for a probability that float32 cannot hold, so that it has a logarithm.
_MIN_PROBABILITY = 1e-37
# The least that a teacher gives to all tokens but k, for a reverse KL (SDPO's).
_MIN_TAIL = 1e-7
# A row of equal logits has no spread to divide by.
_MIN_VARIANCE = 1e-12
# Squared norms below this count as this, so that a zero vector has a finite gradient.
_MIN_SQUARED_NORM = 1e-12
# Numbers that are reduced side by side, so that no sum is of many more than 32.
_BLOCKS = (4096, 256, 16)
# Of the student's logits [n, V] and what is known of the teacher: values [n], gradient [n, V].
Rows = Callable[..., tuple[mx.array, mx.array]]


def divergence_rows(
    student_logits: mx.array, teacher_logits: mx.array, *, beta: float, temperature: float
) -> tuple[mx.array, mx.array]:
    """:func:`mlx_fd.losses.kernels.divergence_rows`, which has the definition, as an MLX graph."""
    student, our_total, q = _softmax(student_logits, temperature)
    teacher, their_total, p = _softmax(teacher_logits, temperature)
    if beta in (0, 1):
        # The logarithm of one quotient loses less than the difference of two logarithms.
        ratio = student - teacher + mx.log(their_total / our_total)
        # q - p sums to 0. Added, no term of a KL is negative, and what the totals lost cancels.
        if beta == 0:
            grad = q - p
            value = _sum(grad - p * ratio)
        else:
            value = _sum(q * ratio + (p - q))
            grad = _slope(q, ratio)
    else:
        p, q = mx.maximum(p, _MIN_PROBABILITY), mx.maximum(q, _MIN_PROBABILITY)
        middle = beta * p + (1 - beta) * q
        ratio = mx.log(q / middle)
        value = beta * _sum(p * mx.log(p / middle)) + (1 - beta) * _sum(q * ratio)
        grad = (1 - beta) * _slope(q, ratio)
    value = temperature**2 * value.squeeze(-1)
    return value, (temperature * grad).astype(student_logits.dtype)


def clipped_divergence_rows(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    beta: float,
    temperature: float,
    clip: float,
) -> tuple[mx.array, mx.array]:
    """:func:`divergence_rows` where no token of the vocabulary adds more than ``clip``.

    D is a sum over the vocabulary (for 0 < beta < 1, of a token's terms of both KLs); each term is
    cut at ``clip`` before it is added, so that a few tokens of style cannot outweigh all others
    (OPSD, arXiv 2601.18734, and RCSD, arXiv 2606.19327). A term above gives no gradient, and the
    sum may be below 0, because a KL's terms may be.

    Args:
        student_logits: [n, V], any float type.
        teacher_logits: [n, V], any float type.
        beta: in [0, 1].
        temperature: T, above 0.
        clip: in nats, before the factor T^2.

    Returns:
        The values [n], float32, and the gradient [n, V] in the type of ``student_logits``.
    """
    student, our_total, q = _softmax(student_logits, temperature)
    teacher, their_total, p = _softmax(teacher_logits, temperature)
    ratio = student - teacher + mx.log(their_total / our_total)
    if beta == 0:
        terms, by_log_q = -p * ratio, -p
    elif beta == 1:
        terms, by_log_q = q * ratio, q * (ratio + 1)
    else:
        p, q = mx.maximum(p, _MIN_PROBABILITY), mx.maximum(q, _MIN_PROBABILITY)
        middle = beta * p + (1 - beta) * q
        by_log_q = (1 - beta) * q * mx.log(q / middle)
        terms = beta * p * mx.log(p / middle) + by_log_q
    grad = mx.where(terms < clip, by_log_q, 0)
    grad = grad - q * (_sum(grad) / _sum(q))
    value = temperature**2 * _sum(mx.minimum(terms, clip)).squeeze(-1)
    return value, (temperature * grad).astype(student_logits.dtype)


def _slope(q: mx.array, ratio: mx.array) -> mx.array:
    """Gradient by a softmax's input, from that by log q but for a constant: [n, V]."""
    # q sums to 1 only nearly. Divided by its sum, a sure row's large ratios cancel all the same.
    return q * (ratio - _sum(q * ratio) / _sum(q))


def _softmax(logits: mx.array, temperature: float) -> tuple[mx.array, mx.array, mx.array]:
    """Rows of at most 0, the sums [n, 1] of their powers of e, and the powers by the sums."""
    rows = logits.astype(mx.float32)
    # At 1e4 a float32 has three decimals: without the shift the logarithm below drowns.
    rows = (rows - _max(rows)) * (1 / temperature)
    rows = mx.maximum(rows, _MIN_LOGIT)
    powers = _exp(rows)
    total = _sum(powers)
    return rows, total, powers * (1 / total)


def _sum(rows: mx.array) -> mx.array:
    """[n, 1] of [n, V], float32."""
    # MLX's sum on a CPU adds number after number, and of 150,000 loses 3e-5: first it adds blocks.
    return _in_blocks(mx.sum, rows).sum(axis=-1, keepdims=True)


def _max(rows: mx.array) -> mx.array:
    """[n, 1] of [n, V]."""
    # On a CPU several blocks side by side take a third of the time of one row.
    return _in_blocks(mx.max, rows).max(axis=-1, keepdims=True)


def _in_blocks(reduce: Callable[..., mx.array], rows: mx.array) -> mx.array:
    """[n, V] made narrower: its blocks reduced to one, and what is left beyond the last whole."""
    for block in _BLOCKS:
        n, width = rows.shape
        if width > block:
            whole = width // block * block
            blocks = reduce(rows[:, :whole].reshape(n, width // block, block), axis=1)
            rows = mx.concatenate([blocks, rows[:, whole:]], axis=-1)
    return rows


def _exp(rows: mx.array) -> mx.array:
    """Powers of e of numbers that are at most 0, float32."""
    return cpu_math.exp(rows) if backend().on_cpu else mx.exp(rows)


def pool(hidden: mx.array, mask: mx.array) -> mx.array:
    """The mean hidden state over the valid positions.

    Args:
        hidden: [B, T, d], any float type.
        mask: [B, T], 1 (true) where the position counts.

    Returns:
        [B, d], float32; 0 for a sample without a valid position.
    """
    valid = mask.astype(mx.bool_)
    total = mx.where(valid[..., None], hidden, 0).astype(mx.float32).sum(axis=1)
    return total / mx.maximum(valid.astype(mx.float32).sum(axis=1, keepdims=True), 1)


def alignment_rows(
    student: mx.array, teacher: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    """:func:`mlx_fd.losses.kernels.alignment_rows` as an MLX graph."""
    valid = mask.astype(mx.bool_)
    # Of each position in the mean; 0 where masked.
    share = valid / mx.maximum(valid.sum(axis=1, keepdims=True), 1).astype(mx.float32)
    if teacher.ndim == 2:
        present = valid.any(axis=1, keepdims=True)
        value, grad = _one_minus_cosine(
            pool(student, mask), mx.where(present, teacher, 0).astype(mx.float32)
        )
        value, grad = mx.where(present.squeeze(1), value, 0), grad[:, None, :]
    else:
        values, grad = _one_minus_cosine(
            mx.where(valid[..., None], student, 0).astype(mx.float32),
            mx.where(valid[..., None], teacher, 0).astype(mx.float32),
        )
        value = (share * values).sum(axis=1)
    return value, (share[..., None] * grad).astype(student.dtype)


def _one_minus_cosine(student: mx.array, teacher: mx.array) -> tuple[mx.array, mx.array]:
    """Over the last axis: the value [...] and its gradient by ``student`` [..., d]."""

    def inverse_norm(vectors: mx.array) -> tuple[mx.array, mx.array]:
        squared = mx.square(vectors).sum(axis=-1, keepdims=True)
        return mx.rsqrt(mx.maximum(squared, _MIN_SQUARED_NORM)), squared > _MIN_SQUARED_NORM

    scale, has_norm = inverse_norm(student)
    unit = student * scale
    target = teacher * inverse_norm(teacher)[0]
    cosine = (unit * target).sum(axis=-1, keepdims=True)
    # Below the least norm the scale is a constant.
    grad = scale * (mx.where(has_norm, cosine, 0) * unit - target)
    return 1 - cosine.squeeze(-1), grad


def top_k_rows(logits: mx.array, k: int) -> tuple[mx.array, mx.array, mx.array]:
    """:func:`mlx_fd.losses.kernels.top_k_rows` as an MLX graph."""
    vocab = logits.shape[-1]
    rows = logits.astype(mx.float32)
    # A float's bits as an integer that sorts like it (+ 0.0: -0 equals 0), then the index: no ties.
    bits = (rows + 0.0).view(mx.int32)
    bits = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    keys = (bits << 32) + mx.arange(vocab - 1, -1, -1, dtype=mx.int64)
    best = mx.sort(mx.partition(keys, vocab - k, axis=-1)[:, vocab - k :], axis=-1)[:, ::-1]
    indices = (vocab - 1 - (best & 0xFFFFFFFF)).astype(mx.int32)
    values = mx.take_along_axis(logits, indices, axis=-1)
    return values, indices, mx.logsumexp(rows, axis=-1)


def top_k_divergence_rows(  # noqa: PLR0913
    student_logits: mx.array,
    values: mx.array,
    indices: mx.array,
    log_sum_exp: mx.array,
    *,
    beta: float,
    temperature: float,
    tail: bool = True,
    clip: float = math.inf,
) -> tuple[mx.array, mx.array]:
    """:func:`divergence_rows` where the teacher is known at k tokens only, its likeliest mostly.

    The distributions are over those k and, as one more outcome, all other tokens together.

    Args:
        student_logits: [n, V], any float type.
        values: [n, k], the teacher's logits there, before the temperature.
        indices: [n, k], all different in a row.
        log_sum_exp: [n], of all the teacher's logits / T.
        beta: in [0, 1].
        temperature: T, above 0.
        tail: ``False`` leaves the other tokens out: both distributions are renormalised over the k,
            and what the student gives to others is not seen. No true divergence, but published.
        clip: as for :func:`clipped_divergence_rows`.

    Returns:
        The values [n], float32, and the gradient [n, V] in the type of ``student_logits``.
    """
    compare = partial(divergence_rows, beta=beta, temperature=1.0)
    if math.isfinite(clip):
        compare = partial(clipped_divergence_rows, beta=beta, temperature=1.0, clip=clip)
    rows = student_logits.astype(mx.float32)
    rows = (rows - _max(rows)) * (1 / temperature)
    student = mx.take_along_axis(rows, indices, axis=-1)
    teacher = values.astype(mx.float32) * (1 / temperature) - log_sum_exp[:, None]
    if not tail or indices.shape[-1] == rows.shape[-1]:
        value, grad = compare(student, teacher)
        grad = mx.put_along_axis(mx.zeros_like(rows), indices, grad, axis=-1)
    else:
        others = mx.put_along_axis(rows, indices, mx.array(-math.inf), axis=-1)
        top = _max(others)
        powers = _exp(others - top)
        total = _sum(powers)
        # Of a sum of float32 no more is known; a reverse KL would take a 0 at its word.
        least = _MIN_TAIL if beta == 1 else 0
        rest = mx.maximum(1 - mx.exp(teacher).sum(axis=-1, keepdims=True), least)
        value, grad = compare(
            mx.concatenate([student, top + mx.log(total)], axis=-1),
            mx.concatenate([teacher, mx.log(rest)], axis=-1),
        )
        shared = powers * (grad[:, -1:] / total)
        grad = mx.put_along_axis(shared, indices, grad[:, :-1], axis=-1)
    return temperature**2 * value, (temperature * grad).astype(student_logits.dtype)


def transformed_rows(
    rows: Rows,
    student: LogitTransform,
    teacher: LogitTransform | None,
    student_product: mx.array,
    *known: mx.array,
) -> tuple[mx.array, mx.array]:
    """``rows`` of logits, from the heads' products that the models make them of.

    Args:
        rows: gives values [n] and the gradient by the student's logits [n, V].
        student: what the student does to its product.
        teacher: what the teacher does to the first array that is known of it; ``None``: nothing.
        student_product: [n, V], any float type.
        *known: of the teacher, as ``rows`` takes it.

    Returns:
        The values [n], float32, and the gradient [n, V] by ``student_product``, in its type.
    """
    if teacher is not None:
        known = (teacher.apply(known[0]), *known[1:])
    logits = student.apply(student_product)
    value, grad = rows(logits, *known)
    return value, student.raw_gradient(grad, logits).astype(student_product.dtype)


def standardized_rows(
    rows: Rows, student_logits: mx.array, teacher_logits: mx.array
) -> tuple[mx.array, mx.array]:
    """``rows`` of z-scored logits (Sun et al., arXiv 2403.01427; population variance).

    Args:
        rows: gives values [n] and the gradient by the student's z-scores [n, V]; the gradient of a
            function that does not see a shift, as a softmax does not.
        student_logits: [n, V], any float type.
        teacher_logits: [n, V], any float type.

    Returns:
        The values [n], float32, and the gradient [n, V] by the student's logits, in their type.
    """

    def z_scores(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        centred = logits.astype(mx.float32)
        centred = centred - _mean(centred)
        variance = _mean(mx.square(centred))
        scale = mx.rsqrt(mx.maximum(variance, _MIN_VARIANCE))
        return centred * scale, scale, variance > _MIN_VARIANCE

    student, scale, has_spread = z_scores(student_logits)
    value, grad = rows(student, z_scores(teacher_logits)[0])
    # What comes through the spread; through the mean comes nothing.
    along = mx.where(has_spread, _mean(grad * student), 0)
    return value, (scale * (grad - along * student)).astype(student_logits.dtype)


def _mean(rows: mx.array) -> mx.array:
    return _sum(rows) * (1 / rows.shape[-1])
