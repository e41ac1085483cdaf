"""The report's charts: rows in, Vega-Lite specifications out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from mlx_fd.display import EXAM_NAMES, STEP_NAMES
from mlx_fd.report.reading import Run
from mlx_fd.report.tables import Table, losses_table, steps_table
from mlx_fd.report.theme import PAGE, themed
from mlx_fd.summary import wilson

# Bins of the accuracy curve: a batch alone is too few episodes for an interval worth drawing.
_BINS = 16
_HEIGHT = 220


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


def _figure(
    title: str, says: str, chart: Any, table: Table | None = None, *, wide: bool = False
) -> Figure:
    sized = chart.properties(width="container")
    return Figure(title, says, themed(sized), table, wide)


def _data(rows: Iterable[Mapping[str, Any]]) -> alt.Data:
    return alt.Data(values=list(rows))


def _x(field: str, title: str) -> alt.X:
    return alt.X(f"{field}:Q", title=title, axis=alt.Axis(tickMinStep=1, grid=False, format="d"))


def _colour(field: str, names: Sequence[str], *, legend: bool = True) -> alt.Color:
    """The palette's colours in the order of the names, the same in every chart of these names."""
    colours = [PAGE.series[place % len(PAGE.series)] for place in range(len(names))]
    scale = alt.Scale(domain=list(names), range=colours)
    return alt.Color(f"{field}:N", scale=scale, legend=alt.Legend() if legend else None)


def _with_points(base: alt.Chart, **line: Any) -> alt.LayerChart:
    """A line whose points can be pointed at."""
    near = alt.selection_point(nearest=True, on="pointerover", clear="pointerout", empty=False)
    points = base.mark_point(size=60, filled=True).encode(
        opacity=alt.condition(near, alt.value(1), alt.value(0))
    )
    return base.mark_line(**line) + points.add_params(near)


def _marks(run: Run) -> list[dict[str, Any]]:
    """Where the student froze and thawed, with the reasons."""
    found, frozen = [], False
    for row in run.metrics:
        if row["frozen"] != frozen:
            frozen = row["frozen"]
            found.append(
                {
                    "run": run.name,
                    "batch": row["batch"] + 1,
                    "what": "freeze" if frozen else "thaw",
                    "reason": row["stop"]["reason"] if row["stop"] else "",
                }
            )
    return found


def _rules(runs: Sequence[Run]) -> alt.LayerChart | None:
    rows = [mark for run in runs for mark in _marks(run)]
    if not rows:
        return None
    base = alt.Chart(_data(rows)).encode(
        x="batch:Q", tooltip=["run:N", "batch:Q", "what:N", "reason:N"]
    )
    rule = base.mark_rule(strokeDash=[2, 3], strokeWidth=1.5, color=PAGE.soft)
    return rule + base.mark_text(align="left", baseline="top", dx=4, color=PAGE.soft).encode(
        y=alt.value(0), text="what:N"
    )


def _layered(*charts: Any) -> Any:
    return alt.layer(*(chart for chart in charts if chart is not None)).properties(height=_HEIGHT)


def loss_figures(runs: Sequence[Run]) -> list[Figure]:
    """One chart for each loss: on the probe set, and in the updates."""
    losses = list(
        dict.fromkeys(name for run in runs for row in run.metrics for name in row["weights"])
    )
    return [figure for name in losses if (figure := _loss_figure(runs, name))]


def _loss_figure(runs: Sequence[Run], loss: str) -> Figure | None:
    rows = []
    for run in runs:
        held_out = [(0, run.probe_first.get(loss))] + [
            (row["batch"] + 1, (row["probe"] or {}).get(loss)) for row in run.metrics
        ]
        learned = [
            (row["batch"] + 1, row["updates"][-1]["losses"].get(loss))
            for row in run.metrics
            if row["updates"]
        ]
        rows += [
            {"run": run.name, "on": on, "batch": batch, "loss": value}
            for on, curve in (("held out", held_out), ("learned from", learned))
            for batch, value in curve
            if value is not None
        ]
    if not rows:
        return None
    several = len(runs) > 1
    colour = (
        _colour("run", [run.name for run in runs])
        if several
        else _colour("on", ["held out", "learned from"])
    )
    base = alt.Chart(_data(rows)).encode(
        x=_x("batch", "batches done"),
        y=alt.Y("loss:Q", title=None, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5)),
        color=colour,
        strokeDash=alt.StrokeDash(
            "on:N",
            scale=alt.Scale(domain=["held out", "learned from"], range=[[1, 0], [4, 3]]),
            legend=alt.Legend() if several else None,
        ),
        tooltip=["run:N", "on:N", "batch:Q", alt.Tooltip("loss:Q", format=".4g")],
    )
    table = losses_table(runs, loss)
    return _figure(
        f"{loss} loss", _loss_says(runs, loss), _layered(_with_points(base), _rules(runs)), table
    )


def _loss_says(runs: Sequence[Run], loss: str) -> str:
    parts = []
    for run in runs:
        first = run.totals["probe"]["before"].get(loss)
        last = run.totals["probe"]["after"].get(loss)
        if first and last is not None:
            name = f"{run.name}: " if len(runs) > 1 else ""
            parts.append(
                f"{name}{first:.3g} to {last:.3g} on held-out problems ({last / first - 1:+.0%})"
            )
    return "; ".join(parts) + "." if parts else "Not measured on held-out problems."


def weight_figure(run: Run) -> Figure | None:
    """What each loss counted, by batch."""
    rows = [
        {"batch": row["batch"] + 1, "loss": name, "weight": value}
        for row in run.metrics
        for name, value in row["weights"].items()
    ]
    if not rows:
        return None
    names = list(dict.fromkeys(row["loss"] for row in rows))
    base = alt.Chart(_data(rows)).encode(
        x=_x("batch", "batches done"),
        y=alt.Y("weight:Q", title=None, scale=alt.Scale(domainMin=0)),
        color=_colour("loss", names),
        tooltip=["loss:N", "batch:Q", alt.Tooltip("weight:Q", format=".3f")],
    )
    last = run.metrics[-1]["weights"]
    says = "At the end: " + ", ".join(f"{name} {value:.2f}" for name, value in last.items()) + "."
    return _figure("Weights of the losses", says, _layered(_with_points(base), _rules([run])))


def gain_figure(run: Run) -> Figure | None:
    """How far each loss has fallen as the gate sees it, and where it stops."""
    rows = [
        {"batch": row["batch"] + 1, "loss": name, "gain": value}
        for row in run.metrics
        if row["stop"]
        for name, value in row["stop"]["gains"].items()
    ]
    if not rows:
        return None
    names = list(dict.fromkeys(row["loss"] for row in rows))
    base = alt.Chart(_data(rows)).encode(
        x=_x("batch", "batches done"),
        y=alt.Y("gain:Q", title=None, axis=alt.Axis(format="%")),
        color=_colour("loss", names),
        tooltip=["loss:N", "batch:Q", alt.Tooltip("gain:Q", format=".1%")],
    )
    threshold = run.manifest.get("options", {}).get("stop_threshold")
    line, above = None, ""
    if isinstance(threshold, (int, float)):
        line = (
            alt.Chart(_data([{"threshold": threshold}]))
            .mark_rule(color=PAGE.soft)
            .encode(y="threshold:Q", tooltip=[alt.Tooltip("threshold:Q", title="stop_threshold")])
        )
        above = f" The line is stop_threshold, {threshold:g}."
    last = next(row["stop"]["gains"] for row in reversed(run.metrics) if row["stop"])
    says = "At the last look: " + ", ".join(f"{name} {value:.0%}" for name, value in last.items())
    marks = "".join(
        f" {m['what'].capitalize()} after batch {m['batch']}: {m['reason']}." for m in _marks(run)
    )
    return _figure(
        "Gains on the probe set",
        f"{says}.{above}{marks}",
        _layered(_with_points(base), line, _rules([run])),
    )


_DECISIONS = ("learned from", "not learned from", "student alone")


def _decision(row: Mapping[str, Any]) -> str:
    if not row["expert_feedback"]:
        return _DECISIONS[2]
    return _DECISIONS[0] if row["gate"]["distilled"] else _DECISIONS[1]


def decision_figure(run: Run) -> Figure | None:
    """What the gate decided for the episodes."""
    if not run.episodes:
        return None
    bins = _binned(run.episodes)
    rows = [
        {
            "first": chunk[0]["episode"],
            "last": chunk[-1]["episode"] + 1,
            "decision": name,
            "episodes": sum(_decision(row) == name for row in chunk),
            "order": order,
        }
        for chunk in bins
        for order, name in enumerate(_DECISIONS)
    ]
    base = (
        alt.Chart(_data(rows))
        .mark_bar(stroke=None)
        .encode(
            x=alt.X("first:Q", title="episodes", axis=alt.Axis(grid=False, format="d")),
            x2="last:Q",
            y=alt.Y("episodes:Q", title=None, stack="zero"),
            color=_colour("decision", _DECISIONS),
            order="order:Q",
            tooltip=["decision:N", "episodes:Q", alt.Tooltip("first:Q", title="from episode")],
        )
    )
    counts = {name: sum(_decision(row) == name for row in run.episodes) for name in _DECISIONS}
    says = (
        f"Of {len(run.episodes)} episodes: "
        + ", ".join(f"{n} {name}" for name, n in counts.items())
        + "."
    )
    return _figure("The gate, by episode", says, base.properties(height=_HEIGHT))


def _binned(rows: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    size = max(1, math.ceil(len(rows) / _BINS))
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def accuracy_figure(runs: Sequence[Run]) -> Figure | None:
    """First and final answers that are right, along the run."""
    names = ("first answers", "final answers")
    rows = []
    for run in runs:
        for chunk in _binned(run.episodes):
            for name, key in zip(names, ("correct_before", "correct_after"), strict=True):
                right = sum(row[key] for row in chunk)
                low, high = wilson(right, len(chunk))
                rows.append(
                    {
                        "run": run.name,
                        "answers": name,
                        "episode": (chunk[0]["episode"] + chunk[-1]["episode"]) / 2,
                        "right": right / len(chunk),
                        "low": low,
                        "high": high,
                        "n": len(chunk),
                    }
                )
    if not rows:
        return None
    several = len(runs) > 1
    colour = _colour("run", [run.name for run in runs]) if several else _colour("answers", names)
    tooltip = [
        "run:N",
        "answers:N",
        alt.Tooltip("right:Q", format=".1%"),
        alt.Tooltip("low:Q", format=".1%"),
        alt.Tooltip("high:Q", format=".1%"),
        "n:Q",
    ]
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("episode:Q", title="episodes", axis=alt.Axis(grid=False, format="d")),
        y=alt.Y("right:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        color=colour,
        strokeDash=alt.StrokeDash(
            "answers:N",
            scale=alt.Scale(domain=list(reversed(names)), range=[[1, 0], [4, 3]]),
            legend=alt.Legend() if several else None,
        ),
        tooltip=tooltip,
    )
    band = None
    if not several:
        band = base.mark_area(opacity=0.15).encode(
            y=alt.Y("low:Q"), y2="high:Q", strokeDash=alt.value([1, 0])
        )
    says = (
        f"Each point is {rows[0]['n']} episodes; "
        + ("the bands are" if band else "pointing at one gives its")
        + " 95 % Wilson intervals. "
        + " ".join(_accuracy_says(run, several) for run in runs)
    )
    return _figure("Right answers along the run", says, _layered(band, _with_points(base)))


def _accuracy_says(run: Run, several: bool) -> str:
    def share(name: str) -> str:
        value = run.totals["accuracy"][name]
        return f"{value['right'] / value['n']:.1%}" if value["n"] else "-"

    whose = f"{run.name}: " if several else "Over all: "
    return f"{whose}{share('first_answers')} of the first, {share('final_answers')} of the final answers."


def exam_figure(runs: Sequence[Run]) -> Figure | None:
    """The examination before and after, with intervals."""
    rows = [
        {
            "run": run.name,
            "measure": _exam_name(name),
            "when": when,
            **{key: sides[side][key] for key in ("value", "low", "high", "n")},
        }
        for run in runs
        for name, sides in run.totals.get("exam", {}).items()
        for side, when in (("before", "before"), ("after", "after"))
        if sides[side]["value"] is not None
    ]
    if not rows:
        return None
    several = len(runs) > 1
    rows = [
        {**row, "who": f"{row['run']}, {row['when']}" if several else row["when"]} for row in rows
    ]
    who = list(dict.fromkeys(row["who"] for row in rows))
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    base = alt.Chart(_data(rows)).encode(
        y=alt.Y("measure:N", title=None, sort=measures, axis=alt.Axis(labelLimit=240, grid=True)),
        yOffset=alt.YOffset("who:N", sort=who),
        color=_colour("who", who),
        tooltip=[
            "measure:N",
            "who:N",
            alt.Tooltip("value:Q", format=".3f"),
            alt.Tooltip("low:Q", format=".3f"),
            alt.Tooltip("high:Q", format=".3f"),
            "n:Q",
        ],
    )
    chart = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=None, axis=alt.Axis(tickCount=6)), x2="high:Q"
    ) + base.mark_point(filled=True, size=70, opacity=1).encode(x="value:Q")
    step = 14 * len(who)
    says = "Points are the student's results on held-out questions, lines 95 % bootstrap intervals."
    return _figure(
        "Examination before and after",
        says,
        chart.properties(height=len(measures) * step + 10),
        wide=True,
    )


def _exam_name(name: str) -> str:
    return EXAM_NAMES.get(name, name).removeprefix("exam: ")


def _bars(runs: Sequence[Run], rows: list[dict[str, Any]], kinds: Sequence[str], unit: str) -> Any:
    steps = list(dict.fromkeys(row["step"] for row in rows))
    several = len(runs) > 1
    chart = (
        alt.Chart(_data(rows))
        .mark_bar(height={"band": 0.8})
        .encode(
            x=alt.X("value:Q", title=unit, axis=alt.Axis(tickCount=5, format="~s")),
            y=alt.Y("step:N", title=None, sort=steps, axis=alt.Axis(labelLimit=200)),
            color=_colour("kind", kinds, legend=len(kinds) > 1)
            if not several or len(kinds) > 1
            else _colour("run", [run.name for run in runs]),
            tooltip=[
                "run:N",
                "step:N",
                "kind:N",
                alt.Tooltip("value:Q", format=",.0f", title=unit),
            ],
        )
    )
    if several:
        chart = chart.encode(yOffset=alt.YOffset("run:N", sort=[run.name for run in runs]))
    return chart.properties(height=len(steps) * (14 + 12 * len(runs)))


def budget_figures(runs: Sequence[Run]) -> list[Figure]:
    """Tokens and seconds by step."""
    kinds = {"tokens": "written", "prefilled": "read first (prefilled)"}
    tokens = [
        {"run": run.name, "step": STEP_NAMES.get(step, step), "kind": kind, "value": value}
        for run in runs
        for key, kind in kinds.items()
        for step, value in run.totals[key].items()
    ]
    tokens += [
        {"run": run.name, "step": STEP_NAMES["distil"], "kind": "learned from", "value": n}
        for run in runs
        if (n := run.totals["updates"]["tokens"])
    ]
    seconds = [
        {"run": run.name, "step": STEP_NAMES.get(step, step), "kind": "seconds", "value": value}
        for run in runs
        for step, value in run.totals["seconds"].items()
        if step != "total"
    ]
    figures = []
    if tokens:
        chart = _bars(runs, tokens, [*kinds.values(), "learned from"], "tokens")
        says = "; ".join(
            f"{run.name + ': ' if len(runs) > 1 else ''}{sum(run.totals['tokens'].values()):,.0f} "
            f"tokens written, {sum(run.totals['prefilled'].values()):,.0f} read first"
            for run in runs
        )
        figures.append(_figure("Tokens by step", f"{says}.", chart, steps_table(runs)))
    if seconds:
        says = "; ".join(
            f"{run.name + ': ' if len(runs) > 1 else ''}{run.totals['seconds']['total']:,.0f} seconds "
            "in all, with what the steps do not count"
            for run in runs
        )
        figures.append(
            _figure("Time by step", f"{says}.", _bars(runs, seconds, ["seconds"], "seconds"))
        )
    return figures


def pareto_figures(run: Run) -> list[Figure]:
    """Each held-out loss against the cost, over stopping thresholds."""
    if not run.pareto or not run.pareto["points"]:
        return []
    points = run.pareto["points"]
    cost = run.pareto["objectives"][0] if run.pareto["objectives"] else "kd_steps"
    if cost not in points[0]["cost"]:
        cost = next(iter(points[0]["cost"]), "")
    losses = list(dict.fromkeys(name for point in points for name in point["losses"]))
    return [_pareto_figure(run.pareto, cost, loss) for loss in losses if cost]


_KINDS = ("recommended", "on the frontier", "dominated")


def _pareto_figure(pareto: Mapping[str, Any], cost: str, loss: str) -> Figure:
    def kind(point: Mapping[str, Any]) -> str:
        if point["recommended"]:
            return _KINDS[0]
        return _KINDS[2] if point["dominated"] else _KINDS[1]

    rows = [
        {
            "cost": point["cost"][cost],
            "loss": point["losses"][loss],
            "stop_threshold": point["stop_threshold"],
            "kind": kind(point),
            "product rule": "yes" if point["stop_threshold"] == pareto["product_rule"] else "no",
        }
        for point in pareto["points"]
        if cost in point["cost"] and loss in point["losses"]
    ]
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("cost:Q", title=cost.replace("_", " "), axis=alt.Axis(format="~s", grid=False)),
        y=alt.Y("loss:Q", title=None, scale=alt.Scale(zero=False)),
        tooltip=[
            "stop_threshold:Q",
            "cost:Q",
            alt.Tooltip("loss:Q", format=".4g"),
            "kind:N",
            "product rule:N",
        ],
    )
    frontier = base.transform_filter(f"datum.kind != '{_KINDS[2]}'").mark_line(
        color=PAGE.series[1], strokeWidth=1, interpolate="step-after"
    )
    scale = alt.Scale(domain=list(_KINDS), range=[PAGE.series[0], PAGE.series[1], PAGE.soft])
    shape = alt.Scale(domain=list(_KINDS), range=["diamond", "circle", "cross"])
    size = alt.Scale(domain=list(_KINDS), range=[220, 60, 50])
    marks = base.mark_point(filled=True, opacity=1).encode(
        color=alt.Color("kind:N", scale=scale, legend=alt.Legend()),
        shape=alt.Shape("kind:N", scale=shape),
        size=alt.Size("kind:N", scale=size),
    )
    best = next((row for row in rows if row["kind"] == _KINDS[0]), None)
    says = f"{len(rows)} stopping thresholds, {sum(row['kind'] != _KINDS[2] for row in rows)} of them on the frontier."
    if best:
        says += f" Recommended: {best['stop_threshold']:g}, at {best['cost']:,.4g} {cost.replace('_', ' ')} a {loss} loss of {best['loss']:.3g}."
    return _figure(f"{loss} loss against the cost", says, _layered(frontier, marks))


def system_figure(found: Mapping[str, Any], measure: str = "accuracy") -> Figure | None:
    """The systems of an evaluation set beside each other, with intervals."""
    rows = [
        {"system": system["label"], **system["measures"][measure]}
        for system in found["systems"]
        if measure in system["measures"] and system["measures"][measure]["value"] is not None
    ]
    if not rows:
        return None
    order = [row["system"] for row in rows]
    base = alt.Chart(_data(rows)).encode(
        y=alt.Y("system:N", title=None, sort=order, axis=alt.Axis(labelLimit=260)),
        tooltip=[
            "system:N",
            alt.Tooltip("value:Q", format=".1%"),
            alt.Tooltip("low:Q", format=".1%"),
            alt.Tooltip("high:Q", format=".1%"),
            "n:Q",
        ],
    )
    axis = alt.Axis(format="%", tickCount=6)
    chart = base.mark_rule(strokeWidth=2, color=PAGE.series[0]).encode(
        x=alt.X("low:Q", title=None, axis=axis, scale=alt.Scale(domain=[0, 1])), x2="high:Q"
    ) + base.mark_point(filled=True, size=80, opacity=1, color=PAGE.series[0]).encode(x="value:Q")
    says = "Points are shares of the problems, lines 95 % intervals."
    return _figure(
        f"{measure.capitalize()}, {found['name']}",
        says,
        chart.properties(height=28 * len(rows)),
        wide=True,
    )
