"""A cascade drawn: accuracy against the share that is passed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from mlx_fd.report import drawing as draw
from mlx_fd.report.theme import PAGE, PAPER, Palette, save_svg

PLOT = "cascade.svg"
# In the order of the legend; random and oracle bound what scores can bring.
LINES = {"oracle": "oracle", "accuracy": "cascade", "random": "random"}


def curve_rows(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of all three lines, a row each."""
    return [
        {
            "passed on": point["passed_on"],
            "accuracy": point[name],
            "who": who,
            "expert tokens": point["expert_tokens"],
        }
        for name, who in LINES.items()
        for point in curve
    ]


def threshold_rows(systems: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where the cascade stands at its threshold, with its interval."""
    [cascade] = [row for row in systems if row["name"] == "cascade"]
    accuracy = cascade["accuracy"]
    return [
        {
            "passed on": cascade["passed_on"],
            "accuracy": accuracy["value"],
            "low": accuracy["low"],
            "high": accuracy["high"],
        }
    ]


def layers(rows: Any, marks: Any, palette: Palette, legend: alt.Legend | None) -> list[alt.Chart]:
    """Three lines over the share passed on, and the threshold.

    Args:
        rows: data of :func:`curve_rows`.
        marks: data of :func:`threshold_rows`.
        palette: colours.
        legend: of the lines; ``None``: altair's own.
    """
    x = alt.X("passed on:Q", title="passed on to the expert", axis=alt.Axis(format="%"))
    y = alt.Y(
        "accuracy:Q", title="accuracy", scale=alt.Scale(zero=False), axis=alt.Axis(format="%")
    )
    names = list(LINES.values())
    colours = alt.Scale(domain=names, range=[palette.soft, palette.series[0], palette.series[1]])
    shown = alt.Color("who:N", scale=colours, title=None, legend=legend or alt.Legend())
    lines = (
        alt.Chart(rows)
        .mark_line(strokeWidth=2)
        .encode(
            x=x,
            y=y,
            color=shown,
            tooltip=draw.tips(
                "who:N",
                alt.Tooltip("passed on:Q", format=".1%"),
                alt.Tooltip("accuracy:Q", format=".1%"),
                alt.Tooltip("expert tokens:Q", format=".1f"),
            ),
        )
    )
    place = alt.Chart(marks).encode(x=x)
    rule = place.mark_rule(color=palette.text).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))
    point = place.mark_point(filled=True, size=90, opacity=1, color=palette.text).encode(y=y)
    return [lines, rule, point]


def figure(measured: Mapping[str, Any], title: str) -> draw.Figure:
    """The curve for the report's page."""
    rows, marks = curve_rows(measured["curve"]), threshold_rows(measured["systems"])
    chart = draw.layered(*layers(draw.ROWS, draw.MARKS, PAGE, draw.legend(list(LINES.values()))))
    by = {row["name"]: row for row in measured["systems"]}
    right = {name: row["accuracy"]["value"] for name, row in by.items()}
    says = (
        f"{measured['n']} problems. At its threshold the cascade passes on "
        f"{by['cascade']['passed_on']:.1%} and gets {right['cascade']:.1%} right; the student "
        f"alone {right['student']:.1%}, the expert alone {right['expert']:.1%}, as many passed on "
        f"by lot {right['random']:.1%}. The vertical line is a 95 % interval."
    )
    return draw.figure(title, says, chart, rows, marks=marks)


def plot(measured: Mapping[str, Any], path: Path) -> None:
    """Write the curve as a picture."""
    rows = draw.inline(curve_rows(measured["curve"]))
    marks = draw.inline(threshold_rows(measured["systems"]))
    chart = alt.layer(*layers(rows, marks, PAPER, None)).properties(
        width=460, height=300, title=f"Cascade on {measured['problems']}, n {measured['n']}"
    )
    save_svg(chart, path)
