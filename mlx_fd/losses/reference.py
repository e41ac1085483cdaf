"""The losses once more, in float64 NumPy and in plain steps, for tests to compare with.

Same arguments as their MLX twins, arrays as NumPy arrays; values only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def mean(total: float, count: float) -> float:
    """``total / count``, or 0 where there was nothing to count."""
    return total / count if count > 0 else 0.0


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
            ours = pool(layer, valid)[sample]
            if projection is not None:
                ours = projection(ours)
            teacher = np.asarray(teacher_layers[pick], np.float64)
            theirs = pool(teacher, valid)[sample] if teacher.ndim == 3 else teacher[sample]
            cosine = ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs))
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


def _log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _kl(log_p: Array, log_q: Array) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum())
