"""The frontier of a run: which stopping thresholds there were, what each cost and brought.

From the files of one run with ``gate = "always"`` to what ``pareto.json`` and ``pareto.toml`` hold.
The choice itself is :mod:`mlx_fd.pareto`'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fd import pareto, runs
from mlx_fd.config import Config, override, read, to_toml
from mlx_fd.errors import UserError
from mlx_fd.gate import SETTLED_OBSERVATIONS
from mlx_fd.pareto import Look, Outcome
from mlx_fd.summary import wilson

JSON = "pareto.json"
PRESET = "pareto.toml"
COSTS = ("kd_steps", "teacher_tokens", "seconds")
ACCURACY = "final_accuracy"
# Measures of the examination that are objectives; more of them is better, and all are shares.
EXAM_MEASURES = ("first_error_f1", "solved")
# Of every objective as a share of its worst: a little worse than the worst, so that a frontier's
# ends count (Ishibuchi et al., 2018).
REFERENCE = 1.1


@dataclass(frozen=True)
class Batch:
    """What learning from a batch of episodes cost: optimiser steps, tokens in them, seconds."""

    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Curve:
    """What a run's files say of how its student learned.

    Attributes:
        config: the run's configuration.
        first: losses on the probe set before the first update.
        last: the same at the run's end, or at its last look where it has not ended.
        looks: the looks between.
        batches: the batches done, in every epoch.
        right: whether each episode's final answer was.
        finished: whether the run came to its end.
    """

    config: Config
    first: dict[str, float]
    last: dict[str, float]
    looks: list[Look]
    batches: list[Batch]
    right: list[bool]
    finished: bool


@dataclass(frozen=True)
class Point:
    """An outcome with what it cost and brought.

    Attributes:
        outcome: the thresholds, and where they stop.
        cost: by the names in :data:`COSTS`.
        losses: on the probe set at the stop.
        metrics: what is measured beside them, each with ``value``, ``low``, ``high`` (a 95 %
            interval) and ``n``.
    """

    outcome: Outcome
    cost: dict[str, float]
    losses: dict[str, float]
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_curve(folder: Path) -> Curve:
    """The learning curve in a run directory.

    Raises:
        UserError: there is no run, its gate was another one, or its files are not whole.
    """
    runs.read_manifest(folder)
    config = read(folder / runs.CONFIG)
    if config.gate.gate != "always":
        raise UserError(
            f"{folder}: this run's gate was {config.gate.gate}, so what comes after a stop cannot "
            f"be seen in it. Make a run that never stops: {_always(folder)}"
        )
    try:
        return _curve(folder, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}: its files are not what this mlx-fd writes ({error!r}). Bring the old ones "
            f"back, or make a new run: {_always(folder)}"
        ) from error


def _always(folder: Path) -> str:
    config, out = folder / runs.CONFIG, folder.with_name(f"{folder.absolute().name}-always")
    quoted = (shlex.quote(str(path)) for path in (config, out))
    return "mlx-fd loop --config {} --gate always --out {}".format(*quoted)


def _curve(folder: Path, config: Config) -> Curve:
    rows = runs.read_lines(folder / runs.METRICS)
    episodes = runs.read_lines(folder / runs.EPISODES)
    summary_file = folder / runs.SUMMARY
    summary = json.loads(summary_file.read_text("utf-8")) if summary_file.exists() else None
    if summary is not None:
        first, last = summary["probe"]["before"], summary["probe"]["after"]
        whole = summary["updates"]["steps"] == sum(len(row["updates"]) for row in rows)
    else:
        checkpoint, _ = runs.newest_checkpoint(folder)
        if checkpoint is None:
            raise UserError(
                f"{folder}: this run has not come to its first checkpoint; go on with: mlx-fd "
                f"resume {shlex.quote(str(folder))}"
            )
        first, last, whole = checkpoint.state["probe_first"], None, True
    begun = math.ceil(len(episodes) / config.generation.batch_size)
    whole = whole and begun <= len(rows) <= begun * config.training.epochs
    numbers = [row["batch"] for row in rows], [row["episode"] for row in episodes]
    if not whole or any(given != list(range(len(given))) for given in numbers):
        raise UserError(
            f"{folder}: lines of {runs.METRICS} or {runs.EPISODES} are missing or harmed. Bring "
            f"the old files back, or make a new run: {_always(folder)}"
        )
    batches, looks = [], []
    spent = 0
    for row in rows:
        updates = row["updates"]
        tokens = sum(int(update["tokens"]) for update in updates)
        batches.append(Batch(len(updates), tokens, _finite(row["distil_seconds"])))
        spent += len(updates)
        if row["probe"]:
            looks.append(Look(row["batch"] + 1, _losses(row["probe"]), float(spent)))
            spent = 0
    first = {name: value for name, value in _losses(first).items() if name in config.losses.losses}
    if last is None:
        last = looks[-1].losses if looks else first
    right = [bool(row["correct_after"]) for row in episodes]
    return Curve(config, first, _losses(last), looks, batches, right, summary is not None)


def _losses(given: Mapping[str, Any]) -> dict[str, float]:
    return {name: _finite(value) for name, value in given.items()}


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} where a finite number belongs")
    return number


def points_of(folder: Path, curve: Curve) -> list[Point]:
    """Every distinct stop of a run, by rising threshold.

    Raises:
        UserError: the run is too short for the gate, or no threshold would have stopped it.
    """
    if len(curve.looks) + 1 < SETTLED_OBSERVATIONS:
        raise UserError(
            f"{folder}: {len(curve.looks)} looks at the probe set are too few: the gate decides "
            f"from {SETTLED_OBSERVATIONS - 1} on. Make a longer run (--episodes), with smaller "
            "batches (--batch-size) or more looks (--probe-every 1)."
        )
    outcomes = pareto.replay(curve.first, curve.looks, curve.config.gate)
    if len(outcomes) == 1 and outcomes[0].stopped_after_batch is None:
        raise UserError(
            f"{folder}: no stop_threshold would have stopped this run in its {len(curve.batches)} "
            "batches: the student has not surely gained enough on every loss (minimum_gain is "
            f"{curve.config.gate.minimum_gain:g}, ema_decay {curve.config.gate.ema_decay:g}). Make "
            "a longer run, one with higher learning rates, or one with a lower ema_decay, whose "
            "gate sees sooner what was gained."
        )
    return [_point(outcome, curve) for outcome in outcomes]


def _point(outcome: Outcome, curve: Curve) -> Point:
    stopped = outcome.stopped_after_batch
    batches = curve.batches[:stopped]
    losses = curve.last if stopped is None else _at(curve.looks, stopped)
    # In later epochs there are no more episodes.
    answered = curve.right[: len(batches) * curve.config.generation.batch_size]
    right, n = sum(answered), len(answered)
    low, high = wilson(right, n)
    return Point(
        outcome,
        {
            "kd_steps": sum(batch.steps for batch in batches),
            "teacher_tokens": sum(batch.tokens for batch in batches),
            "seconds": round(sum(batch.seconds for batch in batches), 3),
        },
        losses,
        {ACCURACY: {"value": right / n, "low": low, "high": high, "n": n}},
    )


def _at(looks: Sequence[Look], batch: int) -> dict[str, float]:
    return next(look.losses for look in looks if look.batch == batch)


def batch_of(point: Point, curve: Curve) -> int:
    """Batches done where a point's student is the one that it ends with."""
    return point.outcome.stopped_after_batch or len(curve.batches)


def examine_points(
    folder: Path,
    curve: Curve,
    points: Sequence[Point],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Point], list[str]]:
    """The points with the examination of the student at each, where its checkpoint is there.

    Args:
        folder: the run directory.
        curve: what was read from it.
        points: its points.
        progress: told of each student examined: step, done, of how many.

    Returns:
        The points, and notes on those without a checkpoint.

    Raises:
        UserError: the run has no examination, or its models are not here.
    """
    from mlx_fd.evaluation.exam import Result, compare, examine
    from mlx_fd.loop import EXAM
    from mlx_fd.models.student import load_student
    from mlx_fd.session import check_same, make_plan, open_pair

    plan = make_plan(curve.config)
    check_same(runs.read_manifest(folder), plan.manifest, folder)
    questions = plan.exam()
    if not questions or not (folder / EXAM).exists():
        raise UserError(
            f"{folder}: this run has no examination; --exam is for runs on --problems arithmetic "
            "with --exam-size above 0."
        )
    before = [Result(**row) for row in json.loads((folder / EXAM).read_text("utf-8"))]
    pair = open_pair(plan)
    wanted = sorted({batch_of(point, curve) for point in points})
    found: dict[int, dict[str, Any]] = {}
    for done, batch in enumerate(wanted):
        progress("students examined", done, len(wanted))
        checkpoint = runs.checkpoint_after(folder, batch)
        if checkpoint is None:
            continue
        load_student(pair.student, checkpoint.folder)
        after = examine(pair, questions, curve.config.generation, lambda step, tokens: None)
        measures = compare(before, after)
        found[batch] = {name: measures[name]["after"] for name in EXAM_MEASURES}
    progress("students examined", len(wanted), len(wanted))
    missing = [str(batch) for batch in wanted if batch not in found]
    notes = []
    if missing:
        notes.append(
            f"no checkpoint after batch {', '.join(missing)}: the examination is shown where there "
            "is one and is no objective; a run with --checkpoint-every 1 --keep-checkpoints "
            f"{len(curve.batches)} keeps all"
        )
    examined = [
        dataclasses.replace(p, metrics={**p.metrics, **found.get(batch_of(p, curve), {})})
        for p in points
    ]
    return examined, notes


def objectives_of(points: Sequence[Point], cost: str, asked: Sequence[str] = ()) -> list[str]:
    """The names of the objectives, the cost first.

    Args:
        points: a run's points.
        cost: one of :data:`COSTS`.
        asked: losses and metrics to judge by; empty: every loss, and of the metrics those of the
            examination. How many final answers were right up to a stop says how the run went, not
            what a stop there leads to, and is an objective only where it is asked for.

    Raises:
        UserError: something is asked for that is not known at every point.
    """
    known = [
        name
        for name in (*points[0].losses, *points[0].metrics)
        if all(_value(point, name) is not None for point in points)
    ]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(
            f"--objectives: {unknown[0]} is not known at every point; choose from "
            f"{', '.join(known)}"
        )
    return [cost, *(asked or [name for name in known if name != ACCURACY])]


def _value(point: Point, name: str) -> float | None:
    if name in point.metrics:
        value: float | None = point.metrics[name]["value"]
        return value
    return {**point.cost, **point.losses}.get(name)


def frontier(
    folder: Path, curve: Curve, points: Sequence[Point], objectives: Sequence[str]
) -> dict[str, Any]:
    """Judge a run's points; what ``pareto.json`` holds.

    Args:
        folder: the run directory.
        curve: what was read from it.
        points: its points.
        objectives: names of the objectives, the cost first.
    """
    whole = _point(Outcome(1.0, 0.0, 1.0, None), curve).cost
    worst = {**whole, **curve.first}

    def share(point: Point, name: str) -> float:
        """What remains of an objective: of the whole cost, of a loss at the start, of 1."""
        value = _value(point, name)
        assert value is not None
        if name in point.metrics:
            return 1 - value
        return value / worst[name] if worst.get(name, 0) > 0 else 1.0

    shares = np.array([[share(point, name) for name in objectives] for point in points])
    kept = pareto.non_dominated(shares)
    front = [place for place, keep in enumerate(kept) if keep]
    costs = shares[front, 0]
    knee = pareto.knee(costs, shares[front, 1:])
    chosen = front[int(np.argmax(costs)) if knee is None else knee]
    losses = np.array([np.mean(list(points[place].losses.values())) for place in front])
    by_product = points[front[pareto.product_rule(costs, losses)]]
    notes = []
    if knee is None:
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
        "points": [
            {
                "stop_threshold": point.outcome.stop_threshold,
                "thresholds": [point.outcome.low, point.outcome.high],
                "stopped_after_batch": point.outcome.stopped_after_batch,
                "cost": point.cost,
                "losses": point.losses,
                "metrics": {name: found["value"] for name, found in point.metrics.items()},
                "estimates": point.metrics,
                "dominated": not kept[place],
                "recommended": place == chosen,
            }
            for place, point in enumerate(points)
        ],
        "hypervolume": pareto.hypervolume(shares, np.full(len(objectives), REFERENCE)),
        "reference": REFERENCE,
        "knee": None if knee is None else points[chosen].outcome.stop_threshold,
        "product_rule": by_product.outcome.stop_threshold,
        "notes": notes,
    }


def recommended(found: Mapping[str, Any]) -> dict[str, Any]:
    """The point of a frontier that is recommended."""
    point: dict[str, Any] = next(p for p in found["points"] if p["recommended"])
    return point


def gated(config: Config, stop_threshold: float) -> Config:
    """A run's configuration with a gate that stops it, and lets every sample through until then."""
    changes = {"gate": "ema", "trigger": "always", "stop_threshold": stop_threshold}
    return override(config, changes, "mlx-fd pareto")


def preset_toml(found: Mapping[str, Any], config: Config) -> str:
    """The recommendation as a configuration that ``mlx-fd loop --config`` takes."""
    point = recommended(found)
    stopped = point["stopped_after_batch"]
    where = f"stops after batch {stopped}" if stopped else "does not stop it"
    return (
        f"# Recommended by mlx-fd pareto {json.dumps(found['run'])[1:-1]}\n"
        f"# With the same seed the gate {where}, after {point['cost']['kd_steps']} steps.\n"
        + to_toml(gated(config, point["stop_threshold"]))
    )


def write(folder: Path, found: Mapping[str, Any], config: Config) -> None:
    """Write ``pareto.json`` and ``pareto.toml`` into the run directory."""
    runs.write_json(folder / JSON, found)
    runs.write_atomic(folder / PRESET, preset_toml(found, config))
