"""The choice among a run's stops, and the files that it is kept in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_fd.config import Config, override, to_toml
from mlx_fd.errors import UserError
from mlx_fd.evaluation.pareto.curve import Curve
from mlx_fd.evaluation.pareto.frontier import hypervolume, knee, non_dominated, product_rule
from mlx_fd.evaluation.pareto.names import ACCURACY
from mlx_fd.evaluation.pareto.points import Point, cost_of
from mlx_fd.files import write_atomic, write_json
from mlx_fd.runs.checked import with_digest
from mlx_fd.runs.records.pareto import ParetoFile, ParetoPointRow

JSON = "pareto.json"
PRESET = "pareto.toml"
# Of every objective as a share of its worst: a little worse than the worst, so that a frontier's
# ends count (Ishibuchi et al., 2018).
REFERENCE = 1.1


def objectives_of(points: Sequence[Point], cost: str, requested: Sequence[str] = ()) -> list[str]:
    """The names of the objectives, the cost first.

    Args:
        points: the stops of one run.
        cost: one of :data:`mlx_fd.evaluation.pareto.names.COSTS`.
        requested: losses and metrics to judge by; empty: every loss, and of the metrics those of
            the examination. How many final answers were right up to a stop says how the run went,
            not what a stop there leads to, and is an objective only where it is asked for.

    Raises:
        UserError: something is asked for that is not known at every point.
    """
    available = [
        name
        for name in (*points[0].losses, *points[0].metrics)
        if all(point.value(name) is not None for point in points)
    ]
    unknown = [name for name in requested if name not in available]
    if unknown:
        raise UserError(
            f"--objectives: {unknown[0]} is not known at every point; choose from "
            f"{', '.join(available)}"
        )
    return [cost, *(requested or [name for name in available if name != ACCURACY])]


def judge(
    folder: Path, curve: Curve, points: Sequence[Point], objectives: Sequence[str]
) -> ParetoFile:
    """Judge a run's points; what ``pareto.json`` holds.

    Args:
        folder: the run directory.
        curve: what was read from it.
        points: its stops, as :func:`mlx_fd.evaluation.pareto.points.points_of` gives them.
        objectives: names of the objectives, the cost first.
    """
    whole = cost_of(curve.batches)
    worst = {**whole, **curve.first}

    def share(point: Point, name: str) -> float:
        """What remains of an objective: of the whole cost, of a loss at the start, of 1."""
        value = point.value(name)
        assert value is not None
        if name in point.metrics:
            return 1 - value
        return value / worst[name] if worst.get(name, 0) > 0 else 1.0

    shares = np.array([[share(point, name) for name in objectives] for point in points])
    kept = non_dominated(shares)
    front = [index for index, keep in enumerate(kept) if keep]
    costs = shares[front, 0]
    bend = knee(costs, shares[front, 1:])
    chosen = front[int(np.argmax(costs)) if bend is None else bend]
    losses = np.array([np.mean(list(points[index].losses.values())) for index in front])
    by_product = points[front[product_rule(costs, losses)]]
    notes = []
    if bend is None:
        notes.append(
            "the frontier has no knee: what is spent last brings as much as what is spent first, "
            "so the latest stop is recommended; a longer run would show more"
        )
    if not curve.finished:
        notes.append(f"the run has not ended; this is what its {len(curve.batches)} batches show")
    if points[chosen].outcome.stopped_after_batch is None:
        notes.append("the recommendation is not to stop within such a run")
    return {
        "format": 1,
        "run": str(folder),
        "batches": len(curve.batches),
        "finished": curve.finished,
        "objectives": list(objectives),
        "start": {"losses": curve.first},
        "whole": whole,
        "points": [
            {
                "stop_threshold": point.outcome.stop_threshold,
                "thresholds": [point.outcome.low, point.outcome.high],
                "stopped_after_batch": point.outcome.stopped_after_batch,
                "cost": point.cost,
                "losses": point.losses,
                "metrics": {name: estimate["value"] for name, estimate in point.metrics.items()},
                "estimates": point.metrics,
                "dominated": not kept[index],
                "recommended": index == chosen,
            }
            for index, point in enumerate(points)
        ],
        "hypervolume": hypervolume(shares, np.full(len(objectives), REFERENCE)),
        "reference": REFERENCE,
        "knee": None if bend is None else points[chosen].outcome.stop_threshold,
        "product_rule": by_product.outcome.stop_threshold,
        "notes": notes,
    }


def recommended(frontier: ParetoFile) -> ParetoPointRow:
    """The point of a frontier that is recommended."""
    return next(point for point in frontier["points"] if point["recommended"])


def gated(config: Config, stop_threshold: float) -> Config:
    """A run's configuration with a gate that stops it, and lets every sample through until then.

    The expert is always asked, as it was in the run that was replayed.
    """
    changes = {
        "gate": "ema",
        "trigger": "always",
        "stop_threshold": stop_threshold,
        "max_disagreement": 0.0,
    }
    return override(config, changes, "mlx-fd pareto")


def preset_toml(frontier: ParetoFile, config: Config) -> str:
    """The recommendation as a configuration that ``mlx-fd loop --config`` takes."""
    point = recommended(frontier)
    stopped = point["stopped_after_batch"]
    where = f"stops after batch {stopped}" if stopped else "does not stop it"
    return (
        f"# Recommended by mlx-fd pareto {shlex.quote(json.dumps(frontier['run'])[1:-1])}\n"
        f"# With the same seed the gate {where}, after {point['cost']['kd_steps']} steps.\n"
        "# The expert is always asked; with --max-disagreement above 0 it is asked less.\n"
        + to_toml(gated(config, point["stop_threshold"]))
    )


def write(folder: Path, frontier: ParetoFile, config: Config) -> None:
    """Write ``pareto.json`` and ``pareto.toml`` into the run directory."""
    write_json(folder / JSON, with_digest(frontier))
    write_atomic(folder / PRESET, preset_toml(frontier, config))
