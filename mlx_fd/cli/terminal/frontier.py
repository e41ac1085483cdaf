"""A frontier as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_fd.cli.terminal.layout import FittingTable
from mlx_fd.evaluation.pareto.choice import recommended
from mlx_fd.evaluation.pareto.names import ACCURACY, COSTS, METRICS, remarks_on
from mlx_fd.runs.records.pareto import ParetoFile


def table(found: Mapping[str, Any]) -> FittingTable:
    """The points of a frontier, a row each: threshold, stop, costs, and the losses there."""
    points = found["points"]
    metrics = dict.fromkeys(name for point in points for name in point["metrics"])
    swept = "real" in points[0]
    header = [
        *("stop", "batch", "expert", "steps", "time", *points[0]["losses"]),
        *(METRICS[name].short for name in metrics),
        *(["in the sweep"] if swept else []),
        "",
    ]
    rows = [_row(point, found, list(metrics), swept) for point in points]
    bold = {index: "bold" for index, point in enumerate(points) if point["recommended"]}
    return FittingTable(header, rows, styles=bold)


def _row(
    point: Mapping[str, Any], found: Mapping[str, Any], metrics: list[str], swept: bool
) -> list[str]:
    cost = point["cost"]
    return [
        f"{point['stop_threshold']:g}",
        _batch(point["stopped_after_batch"]),
        f"{cost['expert_tokens'] / 1000:.1f}k",
        f"{cost['kd_steps']}",
        f"{cost['seconds']:.0f} s",
        *(f"{value:.3g}" for value in point["losses"].values()),
        *(_estimate(point["estimates"].get(name)) for name in metrics),
        *([_real(point["real"])] if swept else []),
        ", ".join(remark.short for remark in remarks_on(point, found)),
    ]


def _batch(stopped: int | None) -> str:
    return "never" if stopped is None else str(stopped)


def _estimate(value: Mapping[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    return f"{value['value']:.0%} ({100 * value['low']:.0f}-{100 * value['high']:.0f})"


def _real(real: Mapping[str, Any]) -> str:
    thawed = real["thawed_after_batch"]
    return (
        _batch(real["stopped_after_batch"])
        + ("" if real["as_predicted"] else ", not as predicted")
        + ("" if thawed is None else f", thawed after {thawed}")
    )


def _about_right(found: ParetoFile) -> str:
    """What the column of right answers is; nobody may know which answers are."""
    right = found["points"][-1]["estimates"].get(ACCURACY)
    if right is None:
        return ""
    return (
        " right: correct final answers up to there, with 95 % intervals; n = "
        f"{right['n']} in the last row."
    )


def summary(found: ParetoFile) -> str:
    """What the table's words mean, and the recommendation."""
    point = recommended(found)
    low, high = point["thresholds"]
    stopped = point["stopped_after_batch"]
    whole = found["whole"]
    name = found["objectives"][0]
    share = point["cost"][name] / whole[name] if whole[name] else 1.0
    return (
        f"expert: tokens of its feedbacks. Held-out losses at the stop.{_about_right(found)}\n"
        "best: the recommendation. product: the published rule, minimum cost x mean loss.\n"
        f"recommended: stop_threshold = {point['stop_threshold']:g} (the same from {low:.3g} to "
        f"{high:.3g}): "
        + (f"stops after batch {stopped}" if stopped else "does not stop")
        + f", {share:.0%} of the {COSTS[name]} of the whole run"
    )
