"""What charts of a run are made of: figures, the axis of batches, colours, lines and bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import altair as alt

from mlx_fd.report.run import Run
from mlx_fd.report.tables import Table
from mlx_fd.report.theme import PAGE, themed
from mlx_fd.runs.summary import wilson_over_problems

# Bins of the accuracy curve: a batch alone is too few episodes for an interval worth drawing.
_BINS = 16
_Record = TypeVar("_Record", bound=Mapping[str, object])
HEIGHT = 220
# Batches of a curve that can be pointed at, at most.
_POINTS = 100
_ALONE = "datum.in_line == 1"
# Pixels: a legend's swatch with its margins, a letter, a label at most, numbers along an axis.
_SWATCH, _LETTER, _LABEL, _AXIS = 34, 7, 220, 44
Layered = alt.LayerChart | alt.FacetChart
"""What Altair makes of charts over each other."""

# Rows are put in at the end: Altair copies data with every step of making a chart.
ROWS, MARKS = alt.NamedData(name="rows"), alt.NamedData(name="marks")


@dataclass(frozen=True)
class Figure:
    """A chart and what stands in its place for those who do not see it.

    Attributes:
        title: what it shows.
        says: the same in a sentence or two, with the numbers that matter.
        specification: Vega-Lite.
        table: the numbers, where ``says`` does not have them all.
        wide: whether it takes the page's whole width.
    """

    title: str
    says: str
    specification: dict[str, Any]
    table: Table | None = None
    wide: bool = False


def tips(*fields: str | alt.Tooltip) -> list[alt.Tooltip]:
    """What is said of a mark that is pointed at.

    Of a string that is no channel yet Altair makes one by comparing all of its classes, which for
    all strings of a page takes half of its time.
    """
    return [alt.Tooltip(field) if isinstance(field, str) else field for field in fields]


def pixels(down: int) -> alt.YValue:
    """A place so many pixels below a chart's top."""
    place: Callable[..., alt.YValue] = alt.YValue
    return place(down)


def inline(rows: Sequence[Mapping[str, Any]]) -> alt.Data:
    """Rows as a chart's data, in their place: altair's InlineData moves them to the page's top."""
    data: Callable[..., alt.Data] = alt.Data
    return data(values=list(rows))


def figure(
    title: str,
    says: str,
    chart: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    marks: Iterable[Mapping[str, Any]] = (),
    table: Table | None = None,
    wide: bool = False,
) -> Figure:
    """A chart with its rows, in the report's look."""
    specification = themed(chart)
    # Here and not as a property, for which Altair copies all of the chart.
    specification["width"] = "container"
    specification["datasets"] = {"rows": list(rows), "marks": list(marks)}
    return Figure(title, says, specification, table, wide)


def _batches(runs: Sequence[Run]) -> int:
    """How many batches the longest run has."""
    return max((row["batch"] + 1 for run in runs for row in run.metrics), default=1)


def every(runs: Sequence[Run]) -> int:
    """Which batches can be pointed at: each is an element of the page."""
    return math.ceil(_batches(runs) / _POINTS)


def along(runs: Sequence[Run]) -> alt.X:
    """The batches, along a chart."""
    return alt.X(
        "batch:Q",
        title="batches done",
        scale=alt.Scale(domain=[0, _batches(runs)], nice=False),
        axis=alt.Axis(tickMinStep=1, grid=False, format="d"),
    )


def colour(
    field: str, names: Sequence[str], *, shown: bool = True, beside: Iterable[str] = ()
) -> alt.Color:
    """The palette's colours in the order of the names, the same in every chart of these names.

    Args:
        field: what is told apart.
        names: its values.
        shown: whether there is a legend.
        beside: names along the chart's left side, which the legend begins to the right of.
    """
    colours = [PAGE.series[place % len(PAGE.series)] for place in range(len(names))]
    scale = alt.Scale(domain=list(names), range=colours)
    return alt.Color(f"{field}:N", scale=scale, legend=legend(names, beside) if shown else None)


def dash(
    field: str, names: Sequence[str], dashes: Sequence[Sequence[int]], *, shown: bool = True
) -> alt.StrokeDash:
    """A dash for each name."""
    scale = alt.Scale(domain=list(names), range=[list(it) for it in dashes])
    return alt.StrokeDash(f"{field}:N", scale=scale, legend=legend(names) if shown else None)


def legend(names: Sequence[str], beside: Iterable[str] = ()) -> alt.Legend:
    """A legend in as many columns as the chart has room for, down to one on a phone."""
    widths = [_SWATCH + min(_LABEL, _LETTER * len(name)) for name in names]
    left = max([_AXIS, *(min(_LABEL, _LETTER * len(name)) for name in beside)])
    # The container's width: the chart's own depends on the legend's. The rest of the expression
    # says when the container is there, and that it can change.
    room = f"((isFinite(containerSize()[0]) ? containerSize()[0] : width) - {left} + 0 * width)"
    columns = f"{room} >= {sum(widths)} ? {len(names)} : max(1, floor({room} / {max(widths)}))"
    # A swatch is as strong as the line, also where the legend is that of a pale band as well.
    return alt.Legend(columns=alt.ExprRef(columns), symbolOpacity=1, labelLimit=_LABEL)


def with_points(base: alt.Chart, series: Sequence[str], every: int = 1) -> Layered:
    """A line whose points show themselves, and their numbers, when they are pointed at.

    A line of one point is no line: its point is always seen.

    Args:
        base: the chart, without a mark.
        series: the fields that make rows the points of one line.
        every: where it is above 1, only batches that it divides can be pointed at.
    """
    hovered = alt.selection_point(on="pointerover", clear="pointerout", empty=False)
    seen = alt.when(hovered).then(alt.value(1)).when(_ALONE).then(alt.value(1))
    points = _counted(base, series).mark_point(size=100, filled=True, strokeOpacity=0)
    if every > 1:
        points = points.transform_filter(f"datum.batch % {every} == 0 || {_ALONE}")
    points = points.encode(opacity=alt.OpacityValue(**seen.otherwise(alt.value(0)))).add_params(
        hovered
    )
    return alt.layer(base.mark_line(), points)


def band(base: alt.Chart, series: Sequence[str]) -> Layered:
    """The intervals around a line, between the fields ``low`` and ``high``; see `with_points`."""
    between = base.encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))
    alone = alt.when(_ALONE).then(alt.value(1)).otherwise(alt.value(0))
    points = (
        _counted(between, series).mark_rule(strokeWidth=2).encode(opacity=alt.OpacityValue(**alone))
    )
    return alt.layer(between.mark_area(opacity=0.15), points)


def _counted(chart: alt.Chart, series: Sequence[str]) -> alt.Chart:
    """With the number of points in a row's line."""
    return chart.transform_joinaggregate(in_line="count()", groupby=list(series))


def marks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Where students froze and thawed, with the reasons."""
    found = []
    for run in runs:
        frozen = False
        for row in run.metrics:
            if row["frozen"] == frozen:
                continue
            frozen = row["frozen"]
            found.append(
                {
                    "run": run.name,
                    "batch": row["batch"] + 1,
                    "what": "freeze" if frozen else "thaw",
                    "reason": _reason(row),
                }
            )
    return found


def _reason(row: Mapping[str, Any]) -> str:
    if row["stop"]:
        return str(row["stop"]["reason"])
    # Only the audited samples can thaw a student without a look at the probe set.
    return "the losses on audited samples have risen"


def rules() -> Layered:
    """The marks, as upright lines."""
    base = alt.Chart(MARKS).encode(
        x=alt.X("batch:Q"), tooltip=tips("run:N", "batch:Q", "what:N", "reason:N")
    )
    rule = base.mark_rule(strokeDash=[2, 3], strokeWidth=1.5, color=PAGE.soft)
    text = base.mark_text(align="left", baseline="top", dx=4, color=PAGE.soft)
    return alt.layer(rule, text.encode(y=pixels(0), text=alt.Text("what:N")))


def layered(*charts: Any) -> Any:
    """Charts over each other; those that are ``None`` are left out."""
    return alt.layer(*(chart for chart in charts if chart is not None), height=HEIGHT)


def binned(rows: Sequence[_Record]) -> list[Sequence[_Record]]:
    """Rows in at most 16 runs of the same length, but for the last."""
    size = max(1, math.ceil(len(rows) / _BINS))
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def accuracy_along(
    title: str,
    says: str,
    found: Mapping[str, Sequence[_Record]],
    one: str,
    number: Callable[[_Record], int],
    kinds: Mapping[str, Callable[[_Record], bool | None]],
) -> Figure | None:
    """Shares that are right along one run or several, with 95 % Wilson intervals.

    Args:
        title: the figure's.
        says: what stands under it, after what its points are.
        found: the rows of each run, by its name.
        one: what a row is called; its plural names the axis.
        number: a row's number in its run.
        kinds: whether a row counts, by what is counted; ``None``: nobody knows, and it is left
            out.
    """
    rows, sizes = [], set[int]()
    for name, of_run in found.items():
        for chunk in binned(of_run):
            sizes.add(len(chunk))
            for kind, counts in kinds.items():
                known = [
                    (str(row["id"]), right) for row in chunk if (right := counts(row)) is not None
                ]
                if not known:
                    continue
                low, high = wilson_over_problems(known)
                rights = [right for _, right in known]
                rows.append(
                    {
                        "run": name,
                        "answers": kind,
                        one: (number(chunk[0]) + number(chunk[-1])) / 2,
                        "right": sum(rights) / len(rights),
                        "low": low,
                        "high": high,
                        "n": len(rights),
                    }
                )
    if not rows:
        return None
    several = len(found) > 1
    base = alt.Chart(ROWS).encode(
        x=alt.X(f"{one}:Q", title=f"{one}s", axis=alt.Axis(grid=False, format="d")),
        y=alt.Y("right:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        color=colour("run", list(found))
        if several
        else colour("answers", list(kinds), shown=len(kinds) > 1),
        tooltip=tips(
            "run:N",
            "answers:N",
            *(alt.Tooltip(f"{key}:Q", format=".1%") for key in ("right", "low", "high")),
            "n:Q",
        ),
    )
    # Final answers, which come last, are drawn through.
    dashes = dash("answers", list(kinds), [[4, 3], [1, 0]][-len(kinds) :], shown=len(kinds) > 1)
    series = ("run", "answers")
    bands = None if several else band(base, series)
    if several:
        under = (
            f"Each run in at most {_BINS} points; pointing at one gives its 95 % Wilson interval. "
            f"{says}"
        )
    else:
        each = max(sizes)
        size = f"{each} {one}s" if each > 1 else f"one {one}"
        fewer = ", the last one fewer" if len(sizes) > 1 else ""
        under = f"Each point is {size}{fewer}; the bands are 95 % Wilson intervals. {says}"
    lines = with_points(base.encode(strokeDash=dashes), series)
    return figure(title, under, layered(bands, lines), rows)


def bars(runs: Sequence[Run], rows: list[dict[str, Any]], kinds: Sequence[str], unit: str) -> Any:
    """Amounts by step, a bar for each kind or for each run."""
    steps = list(dict.fromkeys(row["step"] for row in rows))
    several = len(runs) > 1
    chart = (
        alt.Chart(ROWS)
        .mark_bar(height={"band": 0.8})
        .encode(
            x=alt.X("value:Q", title=unit, axis=alt.Axis(tickCount=5, format="~s")),
            y=alt.Y("step:N", title=None, sort=None, axis=alt.Axis(labelLimit=200)),
            color=colour("kind", kinds, shown=len(kinds) > 1, beside=steps)
            if not several or len(kinds) > 1
            else colour("run", [run.name for run in runs], beside=steps),
            tooltip=tips(
                "run:N",
                "step:N",
                "kind:N",
                alt.Tooltip("value:Q", format=",.0f", title=unit),
            ),
        )
    )
    if several:
        chart = chart.encode(yOffset=alt.YOffset("run:N", sort=None))
    return chart.properties(height=len(steps) * (14 + 12 * len(runs)))


def whose(run: Run, runs: Sequence[Run]) -> str:
    """The run's name before what is said of it, where there are several."""
    return f"{run.name}: " if len(runs) > 1 else ""
