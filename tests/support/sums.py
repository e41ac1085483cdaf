"""Sums of the losses over a batch, as formulas have them."""

from collections.abc import Mapping

import mlx.core as mx

from mlx_fd.config import LossOptions
from mlx_fd.feedback.distill import loss_rows
from mlx_fd.feedback.samples import Batch
from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student


def loss_sums(
    student: Student,
    expert: Loaded,
    batch: Batch,
    options: LossOptions,
    vocab: int,
    factors: Mapping[str, float] | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The total of :func:`mlx_fd.feedback.distill.loss_rows`, and the sum of each loss."""
    total, rows = loss_rows(student, expert, batch, options, vocab, factors)
    return total, {name: of.sum() for name, of in rows.items()}
