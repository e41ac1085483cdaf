"""The points that a frontier is made of: every distinct stop of a run, its cost and its yield."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_fd.errors import UserError
from mlx_fd.evaluation.pareto.curve import BatchCost, Curve
from mlx_fd.evaluation.pareto.names import ACCURACY
from mlx_fd.evaluation.pareto.thresholds import Look, Stop, replay
from mlx_fd.feedback.gate import SETTLED_OBSERVATIONS
from mlx_fd.problems.kinds import known
from mlx_fd.runs.records.parts import EstimateRow
from mlx_fd.runs.summary import wilson


@dataclass(frozen=True)
class Point:
    """An outcome with what it cost and brought.

    Attributes:
        outcome: the thresholds, and where they stop.
        cost: by the names in :data:`mlx_fd.evaluation.pareto.names.COSTS`.
        losses: on the probe set at the stop.
        metrics: what is measured beside them.
    """

    outcome: Stop
    cost: dict[str, float]
    losses: dict[str, float]
    metrics: dict[str, EstimateRow] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """Of a cost, a loss or a metric; ``None`` where it is not known."""
        if name in self.metrics:
            return self.metrics[name]["value"]
        return {**self.cost, **self.losses}.get(name)


def points_of(folder: Path, curve: Curve) -> list[Point]:
    """Every distinct stop of a run, by rising threshold.

    Raises:
        UserError: the run is too short for the gate, or no threshold would have stopped it.
    """
    if len(curve.looks) + 1 < SETTLED_OBSERVATIONS:
        raise UserError(
            f"{folder}: {len(curve.looks)} probe evaluations are too few: the gate decides "
            f"from {SETTLED_OBSERVATIONS - 1} on. Make a longer run (--episodes), with smaller "
            "batches (--batch-size) or more probe evaluations (--probe-every 1)."
        )
    outcomes = replay(curve.first, curve.looks, curve.config.gate)
    if len(outcomes) == 1 and outcomes[0].stopped_after_batch is None:
        raise UserError(
            f"{folder}: no stop_threshold would have stopped this run in its {len(curve.batches)} "
            "batches: the student has not surely gained enough on every loss (minimum_gain is "
            f"{curve.config.gate.minimum_gain:g}, ema_decay {curve.config.gate.ema_decay:g}). Make "
            "a longer run, one with higher learning rates, or one with a lower ema_decay, whose "
            "gate sees sooner what was gained."
        )
    return [_point(outcome, curve) for outcome in outcomes]


def _point(outcome: Stop, curve: Curve) -> Point:
    stopped = outcome.stopped_after_batch
    batches = curve.batches[:stopped]
    losses = curve.last if stopped is None else _at(curve.looks, stopped)
    # In later epochs there are no more episodes.
    answered = known(curve.right[: len(batches) * curve.config.generation.batch_size])
    metrics: dict[str, EstimateRow] = {}
    if n := len(answered):
        right = sum(answered)
        low, high = wilson(right, n)
        metrics[ACCURACY] = {"value": right / n, "low": low, "high": high, "n": n}
    return Point(outcome, cost_of(batches), losses, metrics)


def cost_of(batches: Sequence[BatchCost]) -> dict[str, float]:
    """What learning from some batches cost, by the names in :data:`~.names.COSTS`."""
    return {
        "expert_tokens": sum(batch.expert_tokens for batch in batches),
        "kd_steps": sum(batch.steps for batch in batches),
        "teacher_tokens": sum(batch.tokens for batch in batches),
        "seconds": round(sum(batch.seconds for batch in batches), 3),
    }


def _at(looks: Sequence[Look], batch: int) -> dict[str, float]:
    return next(look.losses for look in looks if look.batch == batch)


def batch_of(point: Point, curve: Curve) -> int:
    """Batches done where a point's student is the one that it ends with."""
    return point.outcome.stopped_after_batch or len(curve.batches)
