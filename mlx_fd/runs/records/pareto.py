"""The frontier of cost and held-out losses: ``pareto.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from mlx_fd.runs.records.parts import EstimateRow


class RealStopRow(TypedDict):
    """With ``mlx-fd pareto --sweep``: what became of a threshold's own run.

    Attributes:
        run: its directory, within the run's.
        stopped_after_batch: where it stopped; null: it did not.
        kd_steps: optimiser steps until then.
        as_predicted: whether these, and the losses there, are those of the replay.
        thawed_after_batch: where it went on learning; null: it did not.
        final_accuracy: final answers right over all episodes; its value is null where no right
            answer is known.
    """

    run: str
    stopped_after_batch: int | None
    kd_steps: int
    as_predicted: bool
    thawed_after_batch: int | None
    final_accuracy: EstimateRow


class ParetoPointRow(TypedDict):
    """A stopping threshold, replayed on a run.

    Attributes:
        stop_threshold: the threshold.
        thresholds: the interval of thresholds with the same stop.
        stopped_after_batch: where it stops; null: it does not.
        cost: by name.
        losses: on the probe set at that point.
        metrics: further measures, without their intervals.
        estimates: the same with intervals.
        dominated: whether another point is at least as good in everything.
        recommended: whether it is the one to take.
        real: with a sweep: what became of it.
    """

    stop_threshold: float
    thresholds: list[float]
    stopped_after_batch: int | None
    cost: Mapping[str, float]
    losses: Mapping[str, float]
    metrics: Mapping[str, float | None]
    estimates: Mapping[str, EstimateRow]
    dominated: bool
    recommended: bool
    real: NotRequired[RealStopRow]


class ParetoStartRow(TypedDict):
    """The student before the first update.

    Attributes:
        losses: on the probe set.
    """

    losses: Mapping[str, float]


class ParetoFile(TypedDict):
    """``pareto.json``.

    Attributes:
        format: of the file.
        run: the run directory.
        batches: batches done.
        finished: whether the run came to its end.
        objectives: names, the cost first.
        start: the student before the first update.
        whole: cost of all batches, by name; the last stop may come before their end.
        points: every distinct stop.
        hypervolume: of the frontier.
        reference: the reference point, as a share of each objective's worst.
        knee: threshold at the frontier's knee; null where it has none.
        product_rule: threshold by the product rule.
        notes: what there is to know of the recommendation.
    """

    format: int
    run: str
    batches: int
    finished: bool
    objectives: list[str]
    start: ParetoStartRow
    whole: dict[str, float]
    points: list[ParetoPointRow]
    hypervolume: float | None
    reference: float
    knee: float | None
    product_rule: float | None
    notes: list[str]
