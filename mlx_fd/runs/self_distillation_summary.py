"""What the rows of a run of self-distillation add up to. Rows in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mlx_fd.runs.records import (
    AttemptRow,
    AttemptsRow,
    SelfHeadroomRow,
    SelfMetricsRow,
    SelfSummary,
    ShareRow,
)
from mlx_fd.runs.summary import seconds_of, wilson

# What the gate watches here: the share of held-out problems that are answered wrong.
WRONG = "wrong"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(math.fsum(known) / len(known), 6) if known else None


def attempts_summary(rows: Sequence[AttemptRow]) -> AttemptsRow:
    """The statistics of some attempts.

    Args:
        rows: of ``attempts.jsonl``, at least one.

    Returns:
        How many there are and how many are right; the shares that teach and that ended themselves;
        means over attempts: reward, length in tokens, entropy in nats, abs(A_t), the share of
        negative A_t on right attempts; and the largest difference of a token's log-probability
        from when it was drawn. ``None`` where nothing is known.
    """
    return {
        "n": len(rows),
        "right": sum(row["correct"] for row in rows),
        "reward": _mean([row["reward"] for row in rows]),
        "teaches": _mean([row["teaches"] for row in rows]),
        "finished": _mean([row["finished"] for row in rows]),
        "tokens": _mean([len(row["tokens"]) for row in rows]),
        "entropy": _mean([row["entropy"] for row in rows]),
        "mean_abs_advantage": _mean([row["mean_abs_advantage"] for row in rows]),
        "negative_on_right": _mean([row["negative_advantage"] for row in rows if row["correct"]]),
        "logprob_gap": max(row["logprob_gap"] for row in rows),
    }


def _share(right: int, n: int) -> ShareRow:
    low, high = wilson(right, n)
    return {"right": right, "n": n, "interval": [round(low, 4), round(high, 4)]}


def _held_out(losses: Mapping[str, float], n: int) -> ShareRow:
    return _share(round((1 - losses[WRONG]) * n), n) if WRONG in losses else _share(0, 0)


def summarise(
    attempts: Sequence[AttemptRow],
    metrics: Sequence[SelfMetricsRow],
    probe_before: Mapping[str, float],
    probe_after: Mapping[str, float],
    probe_size: int,
    headroom: SelfHeadroomRow | None,
    seconds: Mapping[str, float] | None = None,
) -> SelfSummary:
    """The totals of a run: what ``summary.json`` holds.

    Args:
        attempts: rows of ``attempts.jsonl``.
        metrics: rows of ``metrics.jsonl``.
        probe_before: the share of held-out problems answered wrong, before the first update;
            empty where it is not known.
        probe_after: the same at the end.
        probe_size: of how many problems.
        headroom: counts of the headroom check.
        seconds: what was done beside the batches took, by its name.
    """
    updates = [update for row in metrics for update in row["updates"]]
    half = len(attempts) // 2
    clipped = [share for row in metrics for share in row["clipped"]]
    return {
        "attempts": attempts_summary(attempts) if attempts else None,
        "first_half": _share(sum(row["correct"] for row in attempts[:half]), half),
        "second_half": _share(sum(row["correct"] for row in attempts[half:]), len(attempts) - half),
        "held_out": {
            "before": _held_out(probe_before, probe_size),
            "after": _held_out(probe_after, probe_size),
        },
        "probe": {"before": dict(probe_before), "after": dict(probe_after)},
        "headroom": headroom,
        "updates": {
            "batches": sum(bool(row["updates"]) for row in metrics),
            "steps": len(updates),
            "skipped": sum(update["skipped"] for update in updates),
            "tokens": sum(update["tokens"] for update in updates),
            "clipped": _mean(clipped),
        },
        "tokens": {
            "attempt": sum(len(row["tokens"]) for row in attempts),
            "prefilled": sum(row["prefilled"] for row in metrics),
        },
        "seconds": {
            **{
                step: round(sum(row["step_seconds"][step] for row in metrics), 1)
                for step in ("attempt", "context", "learn")
            },
            **seconds_of(metrics, seconds or {}),
        },
    }
