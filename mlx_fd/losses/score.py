"""The score head against the expert's score."""

from __future__ import annotations

import mlx.core as mx


def score_rows(predicted: mx.array, target: mx.array, mask: mx.array) -> mx.array:
    """Squared errors, sample by sample: [B], float32; 0 where the mask is.

    Args:
        predicted: [B], the student's scores in (-1, 1), after tanh.
        target: [B], the expert's scores in [-1, 1]; where the mask is 0, anything.
        mask: [B], 1 (true) where the expert's score could be read.
    """
    valid = mask.astype(mx.bool_)
    student = mx.where(valid, predicted, 0).astype(mx.float32)
    teacher = mx.where(valid, target, 0).astype(mx.float32)
    return mx.square(student - teacher)
