"""A frontier drawn: one loss of it for the report's page, all losses in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt

from mlx_fd.evaluation.pareto.names import COSTS, KINDS, kind_of
from mlx_fd.report import drawing as draw
from mlx_fd.report.theme import PAGE, PAPER, save_svg

PLOT = "pareto.svg"


def _layers(
    points: alt.Chart, line: Mapping[str, Any], *, dominated: bool, **marks: Any
) -> list[alt.Chart]:
    """A line, and the points on it, whose shapes are their kinds.

    Args:
        points: rows with a ``kind``, and where they stand.
        line: how the line looks.
        dominated: whether it goes through dominated points too.
        marks: what the points show beside their kind.
    """
    along = points if dominated else points.transform_filter(f"datum.kind != '{KINDS[2]}'")
    shape = alt.Scale(domain=list(KINDS), range=["diamond", "circle", "cross"])
    return [
        along.mark_line(**line),
        points.mark_point(filled=True, opacity=1).encode(
            shape=alt.Shape("kind:N", scale=shape), **marks
        ),
    ]


def loss_layers(rows: alt.NamedData, cost: str) -> list[alt.Chart]:
    """One loss against the cost, for the page.

    Args:
        rows: with ``cost``, ``loss``, ``stop_threshold``, ``kind`` and ``product rule``.
        cost: the cost's name.
    """
    points = alt.Chart(rows).encode(
        x=alt.X("cost:Q", title=cost.replace("_", " "), axis=alt.Axis(format="~s", grid=False)),
        y=alt.Y("loss:Q", title=None, scale=alt.Scale(zero=False)),
        tooltip=draw.tips(
            "stop_threshold:Q",
            "cost:Q",
            alt.Tooltip("loss:Q", format=".4g"),
            "kind:N",
            "product rule:N",
        ),
    )
    colours = alt.Scale(domain=list(KINDS), range=[PAGE.series[0], PAGE.series[1], PAGE.soft])
    return _layers(
        points,
        {"color": PAGE.series[1], "strokeWidth": 1, "interpolate": "step-after"},
        dominated=False,
        color=alt.Color("kind:N", scale=colours, legend=draw.legend(KINDS)),
        size=alt.condition(f"datum.kind == '{KINDS[0]}'", alt.value(220), alt.value(60)),
    )


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Write a plot: what remains of each loss against the cost, the points marked.

    Of a loss that is zero at the start nothing can remain, and it is left out.
    """
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
    remaining = alt.Scale(domain=[0, 1.2 * max((row["remaining"] for row in rows), default=1)])
    points = alt.Chart(draw.inline(rows)).encode(
        x=alt.X("cost:Q", title=COSTS[cost], scale=alt.Scale(zero=False)),
        y=alt.Y(
            "remaining:Q",
            title="held-out loss, of its start",
            axis=alt.Axis(format="%"),
            scale=remaining,
        ),
        color=alt.Color("loss:N", scale=alt.Scale(domain=names, range=list(PAPER.series))),
    )
    sizes = alt.Scale(domain=list(KINDS), range=[180, 40, 50])
    drawn = _layers(
        points, {"strokeWidth": 1.5}, dominated=True, size=alt.Size("kind:N", scale=sizes)
    )
    thresholds = (
        alt.Chart(draw.inline([row for row in rows if row["loss"] in names[:1]]))
        .mark_text(angle=270, align="left", fontSize=10)
        .encode(x=alt.X("cost:Q"), y=draw.pixels(34), text=alt.Text("label:N"))
    )
    chart = alt.layer(*drawn, thresholds).properties(
        width=560, height=300, title="What each stop_threshold (above the curves) costs and leaves"
    )
    save_svg(chart, path)
