"""The losses of a distillation step: pure, differentiable functions on MLX arrays.

Each returns (sum, count), both float32 scalars: the sum over the valid tokens (samples) and how
many there are. An update's loss is the sum of the sums over all its micro-batches divided by the
sum of the counts, so a batch of 8 gives what 4 batches of 2 give. What a mask leaves out cannot
poison anything, not even as NaN, neither the value nor a gradient.

:mod:`mlx_fd.losses.reference` has a readable float64 twin of each.
"""

from __future__ import annotations

import mlx.core as mx

__all__ = ["mean"]


def mean(total: mx.array, count: mx.array) -> mx.array:
    """``total / count``; 0 where there was nothing to count.

    Args:
        total: sum over valid tokens (samples).
        count: how many there were, in this batch or in the whole update.
    """
    return mx.where(count > 0, total / mx.maximum(count, 1), 0.0)
