"""How many rows of logits there are at a time: what the logit budget holds."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_fd.models.memory import LOGIT_BUDGET


def chunk_size(n: int, vocab: int, arrays: int) -> int:
    """How many of n tokens to take at a time: all that :data:`LOGIT_BUDGET` allows, equal parts.

    Args:
        n: tokens.
        vocab: V, the width of their logits.
        arrays: how many float32 arrays of that width there are at a time.
    """
    most = max(1, LOGIT_BUDGET // (4 * vocab * arrays))
    return math.ceil(n / math.ceil(n / most))


def part_by_part(
    columns: Callable[[slice], tuple[mx.array, ...]], n: int, vocab: int, arrays: int
) -> list[mx.array]:
    """Columns [n, ...] made of as many positions at a time as :func:`chunk_size` says."""
    chunk = chunk_size(n, vocab, arrays)
    parts: list[tuple[mx.array, ...]] = []
    for start in range(0, n, chunk):
        parts.append(columns(slice(start, start + chunk)))
        mx.eval(parts[-1])
    return [mx.concatenate(list(part)) for part in zip(*parts, strict=True)]
