"""How near student and teacher are, from what an update's reading of the attempts says anyway."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_fd.runs.records.self_distillation import HealthRow, PositionRow
from mlx_fd.training.selfdistill.rollout_stats import OVERLAP_TOP_K, RolloutStats

_FIRST_BIN = 8


def health_of(stats: Sequence[RolloutStats]) -> HealthRow | None:
    """A batch's numbers; ``None`` where the teacher read nothing.

    Args:
        stats: of the texts that count, before the update.
    """
    both = [
        (np.array(item.overlap), np.array(item.reverse_kl).astype(np.float64))
        for item in stats
        if item.overlap is not None and item.reverse_kl is not None
    ]
    if not both:
        return None
    tokens = sum(len(overlap) for overlap, _ in both)
    return {
        "top_k": OVERLAP_TOP_K,
        "tokens": tokens,
        "overlap": round(float(sum(overlap.sum() for overlap, _ in both)) / tokens, 6),
        "reverse_kl": round(float(sum(kl.sum() for _, kl in both)) / tokens, 6),
        "positions": _by_position([kl for _, kl in both]),
    }


def _by_position(texts: Sequence[np.ndarray]) -> list[PositionRow]:
    """The mean over all texts' tokens from position 0, 8, 16, 32, ... on."""
    found: list[PositionRow] = []
    begin, end = 0, _FIRST_BIN
    while parts := [part for text in texts if len(part := text[begin:end])]:
        tokens = sum(map(len, parts))
        mean = float(sum(part.sum() for part in parts)) / tokens
        found.append({"first": begin, "tokens": tokens, "reverse_kl": round(mean, 6)})
        begin, end = end, 2 * end
    return found
