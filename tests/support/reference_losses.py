"""The losses once more, in float64 NumPy and in plain steps.

Same arguments as their MLX twins, arrays as NumPy arrays; values only, but for the rows of a top-k,
which give their gradient, too. The other row functions' references are those of
`mlx-fd doctor --kernels`, :mod:`mlx_fd.losses.kernel_checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_fd.losses.kernel_checks import divergence_reference

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
        [result], [gradient] = divergence_reference(
            student[None], teacher[None], beta=beta, temperature=1
        )
        value[row] = temperature**2 * result
        grad[row, chosen] = temperature * gradient[: len(chosen)]
        if len(others):
            # The tail's gradient is shared as its probability is.
            share = np.exp(log_q[row, others] - tail)
            grad[row, others] = temperature * gradient[-1] * share
    return value, grad


def answer_matching_loss(
    logits: ArrayLike, targets: ArrayLike, mask: ArrayLike
) -> tuple[float, float]:
    """Sum over samples of -log p of the whole answer, and the number of samples with one."""
    rows, valid = np.asarray(logits, np.float64), np.asarray(mask, bool)
    total = 0.0
    for sample in np.flatnonzero(valid.any(axis=1)):
        likelihood = 0.0
        for t in np.flatnonzero(valid[sample]):
            row = rows[sample, t] - rows[sample, t].max()
            likelihood += row[np.asarray(targets)[sample, t]] - np.log(np.exp(row).sum())
        total -= likelihood
    return float(total), float(valid.any(axis=1).sum())


def reasoning_path_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    weights: ArrayLike,
    *,
    kl: str,
    temperature: float,
    vocab: int,
    standardize: bool,
) -> tuple[float, float]:
    """Sum over tokens of weight times T^2 times the divergence, and the sum of the weights."""
    student, teacher = np.asarray(student_logits, np.float64), np.asarray(teacher_logits, float)
    counts = np.asarray(weights, np.float64)
    total = 0.0
    for place in zip(*np.nonzero(counts), strict=True):
        value, _ = logit_loss(
            student[place][None],
            teacher[place][None],
            [True],
            kl=kl,
            temperature=temperature,
            vocab=vocab,
            standardize=standardize,
        )
        total += counts[place] * value
    return float(total), float(counts.sum())


def attention_matching_loss(
    student_layers: Sequence[ArrayLike],
    teacher_layers: Sequence[ArrayLike],
    mask: ArrayLike,
    *,
    heads: str,
) -> tuple[float, float]:
    """Per query the mean over layers and heads of KL(teacher || student), and their number."""
    valid = np.asarray(mask, bool)
    total = 0.0
    for layer, pick in enumerate(_evenly(len(student_layers), len(teacher_layers))):
        student = np.exp(np.asarray(student_layers[layer], np.float64))
        teacher = np.exp(np.asarray(teacher_layers[pick], np.float64))
        if heads == "mean":
            student, teacher = student.mean(1, keepdims=True), teacher.mean(1, keepdims=True)
        else:
            teacher = teacher[:, _evenly(student.shape[1], teacher.shape[1])]
        for sample, query in zip(*np.nonzero(valid), strict=True):
            for q, p in zip(student[sample, :, query], teacher[sample, :, query], strict=True):
                # Among the keys that the student sees, where it does not see all of the teacher's.
                lost = (p[q == 0] > 0).any()
                among = np.where(q > 0, p, 0) / p[q > 0].sum() if lost else p
                value = sum(b * np.log(b / a) for a, b in zip(q, among, strict=True) if b > 0)
                total += value / student.shape[1] / len(student_layers)
    return float(total), float(valid.sum())


def _evenly(n_student: int, n_teacher: int) -> list[int]:
    """floor(linspace(0, n_teacher - 1, n_student))."""
    places = np.floor(np.linspace(0, n_teacher - 1, n_student) + 1e-9)
    return [int(place) for place in places]


def _log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _kl(log_p: Array, log_q: Array) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum())


@np.errstate(divide="ignore")
def _log(p: float) -> float:
    return float(np.log(p))
