"""A frontier as a table in the terminal, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt
from rich.table import Table

from mlx_fd.report.theme import PAPER, save_svg

PLOT = "pareto.svg"
_COST_NAMES = {
    "kd_steps": "optimiser steps",
    "teacher_tokens": "tokens learned from",
    "seconds": "seconds",
}
_METRIC_NAMES = {
    "final_accuracy": "right",
    "first_error_f1": "exam: F1",
    "solved": "exam: solved",
}
KINDS = ("recommended", "on the frontier", "dominated")


def kind_of(point: Mapping[str, Any]) -> str:
    """Which of :data:`KINDS` a point of the frontier's file is."""
    return KINDS[0 if point["recommended"] else 2 if point["dominated"] else 1]


def table(found: Mapping[str, Any]) -> Table:
    """The points of a frontier, a row each: thresholds, stops, costs, and what is left there."""
    points = found["points"]
    shown = Table(box=None, pad_edge=False, header_style="dim", collapse_padding=True)
    for name in ("stop", "batch", "steps", "tokens", "time", *points[0]["losses"]):
        shown.add_column(name, justify="right", overflow="fold")
    metrics = dict.fromkeys(name for point in points for name in point["metrics"])
    for name in metrics:
        shown.add_column(_METRIC_NAMES[name], justify="right", overflow="fold")
    swept = "real" in points[0]
    if swept:
        shown.add_column("really", justify="right")
    shown.add_column("")
    for point in points:
        stopped, cost = point["stopped_after_batch"], point["cost"]
        said = [word for word, there in _marks(point, found) if there]
        shown.add_row(
            f"{point['stop_threshold']:g}",
            _batch(stopped),
            f"{cost['kd_steps']}",
            f"{cost['teacher_tokens'] / 1000:.0f}k",
            f"{cost['seconds']:.0f} s",
            *(f"{value:.3g}" for value in point["losses"].values()),
            *(_estimate(point["estimates"].get(name)) for name in metrics),
            *([_real(point["real"])] if swept else []),
            ", ".join(said),
            style="bold" if point["recommended"] else None,
        )
    return shown


def _marks(point: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return [
        ("best", point["recommended"]),
        ("product", point["stop_threshold"] == found["product_rule"]),
        ("dominated", point["dominated"]),
    ]


def _batch(stopped: int | None) -> str:
    return "never" if stopped is None else str(stopped)


def _estimate(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{value['value']:.0%} ({100 * value['low']:.0f}-{100 * value['high']:.0f})"


def _real(real: Mapping[str, Any]) -> str:
    thawed = real["thawed_after_batch"]
    return (
        _batch(real["stopped_after_batch"])
        + ("" if real["as_predicted"] else ", not as predicted")
        + ("" if thawed is None else f", thawed after {thawed}")
    )


def summary(found: Mapping[str, Any]) -> str:
    """What the table's words mean, and the recommendation."""
    point = next(p for p in found["points"] if p["recommended"])
    low, high = point["thresholds"]
    stopped = point["stopped_after_batch"]
    whole = found["points"][-1]["cost"]
    name = found["objectives"][0]
    share = point["cost"][name] / whole[name] if whole[name] else 1.0
    return (
        "Held-out losses at the stop. right: final answers up to there, with 95 % intervals; n = "
        f"{found['points'][-1]['estimates']['final_accuracy']['n']} in the last row.\n"
        "best: the recommendation. product: the published rule, least cost x mean loss.\n"
        f"recommended: stop_threshold = {point['stop_threshold']:g} (the same from {low:.3g} to "
        f"{high:.3g}): "
        + (f"stops after batch {stopped}" if stopped else "does not stop")
        + f", {share:.0%} of the {_COST_NAMES[name]} of the whole run"
    )


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Write a plot: what remains of each loss against the cost, the points marked."""
    cost = found["objectives"][0]
    first = found["start"]["losses"]
    names = [name for name in found["points"][0]["losses"] if first.get(name, 0) > 0]
    rows = [
        {
            "cost": point["cost"][cost],
            "loss": name,
            "remaining": point["losses"][name] / first[name],
            "kind": kind_of(point),
            "label": f"{point['stop_threshold']:g}" if point["stopped_after_batch"] else "",
        }
        for point in found["points"]
        for name in names
    ]
    # Room above the curves for the thresholds.
    remaining = alt.Scale(domain=[0, 1.2 * max(row["remaining"] for row in rows)])
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("cost:Q", title=_COST_NAMES[cost], scale=alt.Scale(zero=False)),
        y=alt.Y(
            "remaining:Q",
            title="held-out loss, of its start",
            axis=alt.Axis(format="%"),
            scale=remaining,
        ),
        color=alt.Color("loss:N", scale=alt.Scale(domain=names, range=list(PAPER.series))),
    )
    shapes = alt.Scale(domain=list(KINDS), range=["diamond", "circle", "cross"])
    sizes = alt.Scale(domain=list(KINDS), range=[180, 40, 50])
    marks = base.mark_point(filled=True, opacity=1).encode(
        shape=alt.Shape("kind:N", scale=shapes), size=alt.Size("kind:N", scale=sizes)
    )
    thresholds = (
        alt.Chart(alt.Data(values=[row for row in rows if row["loss"] == names[0]]))
        .mark_text(angle=270, align="left", fontSize=10)
        .encode(x="cost:Q", y=alt.value(34), text="label:N")
    )
    chart = alt.layer(base.mark_line(strokeWidth=1.5), marks, thresholds).properties(
        width=560, height=300, title="What each stop_threshold (above the curves) costs and leaves"
    )
    save_svg(chart, path)
