"""Alignment of the student's hidden states with the expert's, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_fd.losses import kernels
from mlx_fd.losses.graph import pool


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


def hidden_alignment_rows(
    student_layers: Sequence[mx.array],
    teacher_layers: Sequence[mx.array],
    mask: mx.array,
    projection: Callable[[mx.array], mx.array] | None,
) -> mx.array:
    """Per sample, the mean over layers of 1 - cosine of the pooled hidden states.

    The published loss, with the projection before the normalisation, so that it is a cosine.

    Args:
        student_layers: of [B, T, d_student].
        teacher_layers: of [B, T, d_teacher], or already pooled, [B, d_teacher]; no gradient flows
            into them. Where there are more or fewer than of the student, :func:`aligned_layers`
            picks.
        mask: [B, T], 1 (true) where the position counts.
        projection: a linear map of rows [n, d_student] to [n, d_teacher], without bias; ``None``
            where the widths are equal.

    Returns:
        [B], float32; 0 for a sample without a valid position.

    Raises:
        ValueError: there are no layers to align.
    """
    if not student_layers or not teacher_layers:
        raise ValueError("hidden alignment needs at least one layer of each model")
    picks = aligned_layers(len(student_layers), len(teacher_layers))
    student = mx.concatenate([pool(layer, mask) for layer in student_layers])
    if projection is not None:
        # The mean of projected states, since the projection is linear.
        student = projection(student).astype(mx.float32)
    teacher = [teacher_layers[pick] for pick in picks]
    teacher = [pool(layer, mask) if layer.ndim == 3 else layer for layer in teacher]
    present = mask.astype(mx.bool_).any(axis=1)
    values = _one_minus_cosine(
        student,
        mx.stop_gradient(mx.concatenate([layer.astype(mx.float32) for layer in teacher])),
        mx.concatenate([present] * len(student_layers)),
    )
    return values.reshape(len(student_layers), -1).sum(axis=0) / len(student_layers)


def _one_minus_cosine(student: mx.array, teacher: mx.array, present: mx.array) -> mx.array:
    """Of each row [n, d]: [n], float32; 0 where not ``present`` [n]. One launch on a GPU."""

    @mx.custom_function
    def rows(vectors: mx.array) -> tuple[mx.array, mx.array]:
        return kernels.alignment_rows(vectors[:, None], teacher, present[:, None])

    @rows.vjp
    def rows_vjp(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
        grad: mx.array = cotangents[0][:, None] * outputs[1].squeeze(1)
        return grad.astype(primals.dtype)

    result: Any = rows(student)
    value: mx.array = result[0]
    return value
