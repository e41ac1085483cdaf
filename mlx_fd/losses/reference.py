"""The losses once more, in float64 NumPy and in plain steps, for tests to compare with.

Same arguments as their MLX twins, arrays as NumPy arrays; values only, but for the row functions,
which give their gradient, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def language_model_loss(
    logits: ArrayLike, targets: ArrayLike, mask: ArrayLike
) -> tuple[float, float]:
    """Sum of -log p(target) over the valid tokens, and their number."""
    rows, valid = np.asarray(logits, np.float64), np.asarray(mask, bool)
    log_p = _log_softmax(rows[valid])
    wanted = np.asarray(targets)[valid]
    return -float(log_p[np.arange(len(wanted)), wanted].sum()), float(valid.sum())


def pool(hidden: ArrayLike, mask: ArrayLike) -> Array:
    """The mean hidden state over the valid positions, [B, d]; 0 where there is none."""
    states, valid = np.asarray(hidden, np.float64), np.asarray(mask, bool)
    return np.stack(
        [
            rows[chosen].mean(axis=0) if chosen.any() else np.zeros(states.shape[-1])
            for rows, chosen in zip(states, valid, strict=True)
        ]
    )


def hidden_alignment_loss(
    student_layers: Sequence[ArrayLike],
    teacher_layers: Sequence[ArrayLike],
    mask: ArrayLike,
    projection: Callable[[Array], Array] | None,
) -> tuple[float, float]:
    """Per sample the mean over layers of 1 - cosine; summed, and the number of samples."""
    valid = np.asarray(mask, bool)
    picks = np.floor(np.linspace(0, len(teacher_layers) - 1, len(student_layers)) + 1e-9)
    total = 0.0
    for sample in np.flatnonzero(valid.any(axis=1)):
        for layer, pick in zip(student_layers, picks.astype(int), strict=True):
            student = pool(layer, valid)[sample]
            if projection is not None:
                student = projection(student)
            teacher = np.asarray(teacher_layers[pick], np.float64)
            teacher_rows = pool(teacher, valid)[sample] if teacher.ndim == 3 else teacher[sample]
            cosine = (
                student @ teacher_rows / (np.linalg.norm(student) * np.linalg.norm(teacher_rows))
            )
            total += (1 - cosine) / len(student_layers)
    return float(total), float(valid.any(axis=1).sum())


def score_loss(predicted: ArrayLike, target: ArrayLike, mask: ArrayLike) -> tuple[float, float]:
    """Sum of squared errors over the samples with a score, and their number."""
    valid = np.asarray(mask, bool)
    error = np.asarray(predicted, np.float64)[valid] - np.asarray(target, np.float64)[valid]
    return float((error**2).sum()), float(valid.sum())


def logit_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    mask: ArrayLike,
    *,
    kl: str,
    temperature: float,
    vocab: int,
    standardize: bool,
) -> tuple[float, float]:
    """Sum over the valid tokens of T^2 times the divergence, and their number."""
    valid = np.asarray(mask, bool)

    def log_p(logits: ArrayLike) -> Array:
        rows = np.asarray(logits, np.float64)[valid][:, :vocab]
        if standardize:
            rows = (rows - rows.mean(axis=-1, keepdims=True)) / rows.std(axis=-1, keepdims=True)
        return _log_softmax(rows / temperature)

    student, teacher = log_p(student_logits), log_p(teacher_logits)
    if kl == "forward":
        divergence = _kl(teacher, student)
    elif kl == "reverse":
        divergence = _kl(student, teacher)
    else:
        middle = np.logaddexp(student, teacher) - np.log(2)
        divergence = (_kl(teacher, middle) + _kl(student, middle)) / 2
    return temperature**2 * float(divergence), float(valid.sum())


@np.errstate(invalid="ignore")
def divergence_rows(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, beta: float, temperature: float
) -> tuple[Array, Array]:
    """Generalised Jensen-Shannon divergence of each row times T^2, and its gradient."""
    log_q = _log_softmax(np.asarray(student_logits, np.float64) / temperature)
    log_p = _log_softmax(np.asarray(teacher_logits, np.float64) / temperature)
    q, p = np.exp(log_q), np.exp(log_p)
    if beta == 0:
        value, grad = _kl_rows(log_p, log_q), q - p
    elif beta == 1:
        value = _kl_rows(log_q, log_p)
        grad = _times(q, log_q - log_p - value[:, None])
    else:
        log_m = np.logaddexp(log_p + np.log(beta), log_q + np.log(1 - beta))
        of_student = _kl_rows(log_q, log_m)
        value = beta * _kl_rows(log_p, log_m) + (1 - beta) * of_student
        grad = (1 - beta) * _times(q, log_q - log_m - of_student[:, None])
    return temperature**2 * value, temperature * grad


def top_k_divergence_rows(
    student_logits: ArrayLike,
    values: ArrayLike,
    indices: ArrayLike,
    log_sum_exp: ArrayLike,
    *,
    beta: float,
    temperature: float,
) -> tuple[Array, Array]:
    """The divergence over the k tokens and all others as one more, times T^2; its gradient."""
    log_q = _log_softmax(np.asarray(student_logits, np.float64) / temperature)
    whole = np.asarray(log_sum_exp, np.float64)[:, None]
    log_p = np.asarray(values, np.float64) / temperature - whole
    value, grad = np.zeros(len(log_q)), np.zeros_like(log_q)
    for row, chosen in enumerate(np.asarray(indices)):
        others = np.setdiff1d(np.arange(log_q.shape[1]), chosen)
        student, teacher = log_q[row, chosen], log_p[row]
        if len(others):
            tail = np.logaddexp.reduce(log_q[row, others])
            rest = max(1 - np.exp(teacher).sum(), 0)
            student, teacher = np.append(student, tail), np.append(teacher, _log(rest))
        [result], [gradient] = divergence_rows([student], [teacher], beta=beta, temperature=1)
        value[row] = temperature**2 * result
        grad[row, chosen] = temperature * gradient[: len(chosen)]
        if len(others):
            # The tail's gradient is shared as its probability is.
            share = np.exp(log_q[row, others] - tail)
            grad[row, others] = temperature * gradient[-1] * share
    return value, grad


def alignment_rows(student: ArrayLike, teacher: ArrayLike, mask: ArrayLike) -> tuple[Array, Array]:
    """1 - cosine for each sample, of the mean states or as the mean over positions; gradient."""
    student_rows, teacher_rows = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    valid = np.asarray(mask, bool)
    value, grad = np.zeros(len(student_rows)), np.zeros_like(student_rows)
    for sample in np.flatnonzero(valid.any(axis=1)):
        states = student_rows[sample, valid[sample]]
        if teacher_rows.ndim == 2:
            value[sample], gradient = _one_minus_cosine(states.mean(axis=0), teacher_rows[sample])
            grad[sample, valid[sample]] = gradient / len(states)
        else:
            pairs = zip(states, teacher_rows[sample, valid[sample]], strict=True)
            each = [_one_minus_cosine(a, b) for a, b in pairs]
            value[sample] = np.mean([one for one, _ in each])
            grad[sample, valid[sample]] = np.array([g for _, g in each]) / len(states)
    return value, grad


def _one_minus_cosine(a: Array, b: Array) -> tuple[float, Array]:
    size, unit = np.linalg.norm(a), b / np.linalg.norm(b)
    cosine = float(a @ unit / size)
    return 1 - cosine, (cosine * a / size - unit) / size


def top_k_rows(logits: ArrayLike, k: int) -> tuple[Array, NDArray[np.int64], Array]:
    """The k largest logits, their indices (of equals the lower first), and the log-sum-exp."""
    rows = np.asarray(logits, np.float64)
    indices = np.argsort(-rows, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(rows, indices, -1), indices, np.logaddexp.reduce(rows, axis=-1)


def _log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _kl(log_p: Array, log_q: Array) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _kl_rows(log_p: Array, log_q: Array) -> Array:
    return np.asarray(_times(np.exp(log_p), log_p - log_q).sum(axis=-1))


def _times(p: Array, numbers: Array) -> Array:
    """``p * numbers``, and 0 where p is 0, whatever the number."""
    return np.multiply(p, numbers, out=np.zeros_like(p), where=p > 0)


@np.errstate(divide="ignore")
def _log(p: float) -> float:
    return float(np.log(p))
