"""Losses of samples as the sum and what it is divided by: what their references give."""

import mlx.core as mx

from mlx_fd.losses.attention import attention_matching_rows
from mlx_fd.losses.hidden import hidden_alignment_rows
from mlx_fd.losses.score import score_rows


def score_loss(predicted, target, mask):
    """Over the samples with a score."""
    return score_rows(predicted, target, mask).sum(), mask.astype(mx.bool_).sum().astype(mx.float32)


def hidden_alignment_loss(student_layers, teacher_layers, mask, projection):
    """Over the samples with a valid position."""
    rows = hidden_alignment_rows(student_layers, teacher_layers, mask, projection)
    return rows.sum(), mask.astype(mx.bool_).any(axis=1).sum().astype(mx.float32)


def attention_matching_loss(student_layers, teacher_layers, mask, *, heads):
    """Over the valid queries."""
    rows = attention_matching_rows(student_layers, teacher_layers, mask, heads=heads)
    return rows.sum(), mask.astype(mx.bool_).sum().astype(mx.float32)
