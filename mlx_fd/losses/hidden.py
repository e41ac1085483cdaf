"""Alignment of the student's hidden states with the expert's, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

# Squared norms below this count as this, so that a zero vector has a finite gradient.
_LEAST_SQUARED_NORM = 1e-12


def aligned_layers(n_student: int, n_teacher: int) -> list[int]:
    """The teacher layer that each student layer is aligned with.

    floor(linspace(0, n_teacher - 1, n_student)) in exact integers: first with first, last with
    last, evenly between. A single student layer goes with the teacher's first.

    Args:
        n_student: layers of the student, at least 1.
        n_teacher: layers of the teacher, at least 1.
    """
    steps = max(n_student - 1, 1)
    return [layer * (n_teacher - 1) // steps for layer in range(n_student)]


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


def hidden_alignment_loss(
    student_layers: Sequence[mx.array],
    teacher_layers: Sequence[mx.array],
    mask: mx.array,
    projection: Callable[[mx.array], mx.array] | None,
) -> tuple[mx.array, mx.array]:
    """Per sample, the mean over layers of 1 - cosine of the pooled hidden states.

    The published loss, with the projection before the normalisation, so that it is a cosine.

    Args:
        student_layers: of [B, T, d_student].
        teacher_layers: of [B, T, d_teacher], or already pooled, [B, d_teacher]; no gradient flows
            into them. Where there are more or fewer than of the student, :func:`aligned_layers`
            picks.
        mask: [B, T], 1 (true) where the position counts.
        projection: maps [B, d_student] to [B, d_teacher]; ``None`` where the widths are equal.

    Returns:
        The sum over samples with at least one valid position and their number, float32.

    Raises:
        ValueError: there are no layers to align.
    """
    if not student_layers or not teacher_layers:
        raise ValueError("hidden_alignment_loss needs at least one layer of each model")
    present = mask.astype(mx.bool_).any(axis=1)
    total = mx.zeros(present.shape)
    picks = aligned_layers(len(student_layers), len(teacher_layers))
    for layer, pick in zip(student_layers, picks, strict=True):
        pooled = pool(layer, mask)
        if projection is not None:
            pooled = projection(pooled).astype(mx.float32)
        teacher = mx.stop_gradient(teacher_layers[pick])
        teacher = pool(teacher, mask) if teacher.ndim == 3 else teacher.astype(mx.float32)
        teacher = mx.where(present[:, None], teacher, 0)
        total = total + 1 - (_unit(pooled) * _unit(teacher)).sum(axis=-1)
    losses = total / len(student_layers)
    return mx.where(present, losses, 0).sum(), present.astype(mx.float32).sum()


def _unit(vectors: mx.array) -> mx.array:
    squared = mx.square(vectors).sum(axis=-1, keepdims=True)
    return vectors * mx.rsqrt(mx.maximum(squared, _LEAST_SQUARED_NORM))
