"""The reasoning losses and the universal logit distance once more, in float64 NumPy.

Same arguments as their MLX twins, arrays as NumPy arrays; values only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_fd.losses import reference

Array = NDArray[np.float64]


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
        value, _ = reference.logit_loss(
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
                value = sum(b * np.log(b / a) for a, b in zip(q, p, strict=True) if b > 0)
                total += value / student.shape[1] / len(student_layers)
    return float(total), float(valid.sum())


def uld_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    student_mask: ArrayLike,
    teacher_mask: ArrayLike,
    *,
    temperature: float,
) -> tuple[float, float]:
    """Sum over the compared positions of the L1 distance of sorted probabilities."""
    student, teacher = np.asarray(student_logits, np.float64), np.asarray(teacher_logits, float)
    student_rows, teacher_rows = np.asarray(student_mask, bool), np.asarray(teacher_mask, bool)
    total = count = 0.0
    for sample in range(len(student_rows)):
        for t in range(min(student_rows.shape[1], teacher_rows.shape[1])):
            if student_rows[sample, t] and teacher_rows[sample, t]:
                p = _largest_first(student[sample, t] / temperature)
                q = _largest_first(teacher[sample, t] / temperature)
                shared = min(len(p), len(q))
                total += np.abs(p[:shared] - q[:shared]).sum()
                total += p[shared:].sum() + q[shared:].sum()
                count += 1
    return float(total), float(count)


def _evenly(n_student: int, n_teacher: int) -> list[int]:
    """floor(linspace(0, n_teacher - 1, n_student))."""
    places = np.floor(np.linspace(0, n_teacher - 1, n_student) + 1e-9)
    return [int(place) for place in places]


def _largest_first(row: Array) -> Array:
    p = np.exp(row - row.max())
    return np.asarray(np.sort(p / p.sum())[::-1])
