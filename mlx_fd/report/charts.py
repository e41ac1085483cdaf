"""The report's charts: rows in, Vega-Lite specifications out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from mlx_fd.display import EXAM_NAMES
from mlx_fd.evaluation.names import is_share, shown_name
from mlx_fd.pareto.names import KINDS, kind_of
from mlx_fd.report.frontier import loss_layers
from mlx_fd.report.reading import Run
from mlx_fd.report.tables import STEP_NAMES, Table, losses_table, measures_of, steps_table
from mlx_fd.report.theme import PAGE, themed
from mlx_fd.summary import wilson

# Bins of the accuracy curve: a batch alone is too few episodes for an interval worth drawing.
_BINS = 16
_HEIGHT = 220
# Batches of a curve that can be pointed at, at most.
_POINTS = 100
# Rows are put in at the end: Altair copies data with every step of making a chart.
_ROWS, _MARKS = alt.NamedData(name="rows"), alt.NamedData(name="marks")


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
    title: str,
    says: str,
    chart: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    marks: Iterable[Mapping[str, Any]] = (),
    table: Table | None = None,
    wide: bool = False,
) -> Figure:
    specification = themed(chart.properties(width="container"))
    specification["datasets"] = {"rows": list(rows), "marks": list(marks)}
    return Figure(title, says, specification, table, wide)


def _batches(runs: Sequence[Run]) -> int:
    """How many batches the longest run has."""
    return max((row["batch"] + 1 for run in runs for row in run.metrics), default=1)


def _every(runs: Sequence[Run]) -> int:
    """Which batches can be pointed at: each is an element of the page."""
    return math.ceil(_batches(runs) / _POINTS)


def _along(runs: Sequence[Run]) -> alt.X:
    """The batches, along a chart."""
    return alt.X(
        "batch:Q",
        title="batches done",
        scale=alt.Scale(domain=[0, _batches(runs)], nice=False),
        axis=alt.Axis(tickMinStep=1, grid=False, format="d"),
    )


def _colour(field: str, names: Sequence[str], *, legend: bool = True) -> alt.Color:
    """The palette's colours in the order of the names, the same in every chart of these names."""
    colours = [PAGE.series[place % len(PAGE.series)] for place in range(len(names))]
    scale = alt.Scale(domain=list(names), range=colours)
    return alt.Color(f"{field}:N", scale=scale, legend=alt.Legend() if legend else None)


def _with_points(base: alt.Chart, every: int = 1) -> alt.LayerChart:
    """A line whose points show themselves, and their numbers, when they are pointed at.

    Args:
        base: the chart, without a mark.
        every: where it is above 1, only batches that it divides can be pointed at.
    """
    hovered = alt.selection_point(on="pointerover", clear="pointerout", empty=False)
    points = base.mark_point(size=150, filled=True, strokeOpacity=0).encode(
        opacity=alt.condition(hovered, alt.value(1), alt.value(0))
    )
    if every > 1:
        points = points.transform_filter(f"datum.batch % {every} == 0")
    return base.mark_line() + points.add_params(hovered)


def _marks(runs: Sequence[Run]) -> list[dict[str, Any]]:
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


def _rules() -> alt.LayerChart:
    """The marks, as upright lines."""
    base = alt.Chart(_MARKS).encode(x="batch:Q", tooltip=["run:N", "batch:Q", "what:N", "reason:N"])
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
    base = alt.Chart(_ROWS).encode(
        x=_along(runs),
        y=alt.Y("loss:Q", title=None, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5)),
        color=colour,
        strokeDash=alt.StrokeDash(
            "on:N",
            scale=alt.Scale(domain=["held out", "learned from"], range=[[1, 0], [4, 3]]),
        ),
        tooltip=["run:N", "on:N", "batch:Q", alt.Tooltip("loss:Q", format=".4g")],
    )
    return _figure(
        f"{loss} loss",
        _loss_says(runs, loss),
        _layered(_with_points(base, _every(runs)), _rules()),
        rows,
        marks=_marks(runs),
        table=losses_table(runs, loss),
    )


def _loss_says(runs: Sequence[Run], loss: str) -> str:
    parts = []
    for run in runs:
        first = run.totals["probe"]["before"].get(loss)
        last = run.totals["probe"]["after"].get(loss)
        if first and last is not None:
            parts.append(
                f"{_whose(run, runs)}{first:.3g} to {last:.3g} on held-out problems "
                f"({last / first - 1:+.0%})"
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
    base = alt.Chart(_ROWS).encode(
        x=_along([run]),
        y=alt.Y("weight:Q", title=None, scale=alt.Scale(domainMin=0)),
        color=_colour("loss", names),
        tooltip=["loss:N", "batch:Q", alt.Tooltip("weight:Q", format=".3f")],
    )
    last = run.metrics[-1]["weights"]
    says = "At the end: " + ", ".join(f"{name} {value:.2f}" for name, value in last.items()) + "."
    return _figure(
        "Weights of the losses",
        says,
        _layered(_with_points(base, _every([run])), _rules()),
        rows,
        marks=_marks([run]),
    )


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
    base = alt.Chart(_ROWS).encode(
        x=_along([run]),
        y=alt.Y("gain:Q", title=None, axis=alt.Axis(format="%")),
        color=_colour("loss", names),
        tooltip=["loss:N", "batch:Q", alt.Tooltip("gain:Q", format=".1%")],
    )
    threshold = run.manifest["options"].get("stop_threshold")
    line, above = None, ""
    if isinstance(threshold, (int, float)):
        line = (
            alt.Chart(alt.Data(values=[{"threshold": threshold}]))
            .mark_rule(color=PAGE.soft)
            .encode(y="threshold:Q", tooltip=[alt.Tooltip("threshold:Q", title="stop_threshold")])
        )
        above = f" The line is stop_threshold, {threshold:g}."
    last = next(row["stop"]["gains"] for row in reversed(run.metrics) if row["stop"])
    says = "At the last look: " + ", ".join(f"{name} {value:.0%}" for name, value in last.items())
    marks = "".join(
        f" {m['what'].capitalize()} after batch {m['batch']}: {m['reason']}." for m in _marks([run])
    )
    return _figure(
        "Gains on the probe set",
        f"{says}.{above}{marks}",
        _layered(_with_points(base, _every([run])), line, _rules()),
        rows,
        marks=_marks([run]),
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
    rows = []
    for chunk in _binned(run.episodes):
        below = 0
        for name in _DECISIONS:
            count = sum(_decision(row) == name for row in chunk)
            place = {"first": chunk[0]["episode"], "last": chunk[-1]["episode"] + 1}
            rows.append(
                {**place, "decision": name, "episodes": count, "from": below, "to": below + count}
            )
            below += count
    base = (
        alt.Chart(_ROWS)
        .mark_rect(stroke=PAGE.back, strokeWidth=1)
        .encode(
            x=alt.X("first:Q", title="episodes", axis=alt.Axis(grid=False, format="d")),
            x2="last:Q",
            y=alt.Y("from:Q", title=None),
            y2="to:Q",
            color=_colour("decision", _DECISIONS),
            tooltip=[
                "decision:N",
                "episodes:Q",
                alt.Tooltip("first:Q", title="from episode"),
                alt.Tooltip("last:Q", title="up to"),
            ],
        )
    )
    counts = {name: sum(_decision(row) == name for row in run.episodes) for name in _DECISIONS}
    says = (
        f"Of {len(run.episodes)} episodes: "
        + ", ".join(f"{n} {name}" for name, n in counts.items())
        + "."
    )
    return _figure("The gate, by episode", says, base.properties(height=_HEIGHT), rows)


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
    tooltip: list[Any] = [
        "run:N",
        "answers:N",
        alt.Tooltip("right:Q", format=".1%"),
        alt.Tooltip("low:Q", format=".1%"),
        alt.Tooltip("high:Q", format=".1%"),
        "n:Q",
    ]
    base = alt.Chart(_ROWS).encode(
        x=alt.X("episode:Q", title="episodes", axis=alt.Axis(grid=False, format="d")),
        y=alt.Y("right:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        color=colour,
        tooltip=tooltip,
    )
    dash = alt.Scale(domain=list(names), range=[[4, 3], [1, 0]])
    dashed = base.encode(strokeDash=alt.StrokeDash("answers:N", scale=dash))
    band = None
    if not several:
        band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q"), y2="high:Q")
    says = (
        f"Each point is {rows[0]['n']} episodes; "
        + ("the bands are" if band else "pointing at one gives its")
        + " 95 % Wilson intervals. "
        + " ".join(_accuracy_says(run, several) for run in runs)
    )
    return _figure("Right answers along the run", says, _layered(band, _with_points(dashed)), rows)


def _accuracy_says(run: Run, several: bool) -> str:
    def share(name: str) -> str:
        value = run.totals["accuracy"][name]
        return f"{value['right'] / value['n']:.1%}" if value["n"] else "-"

    whose = f"{run.name}: " if several else "Over all: "
    first, final = share("first_answers"), share("final_answers")
    return f"{whose}{first} of the first, {final} of the final answers."


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
    base = alt.Chart(_ROWS).encode(
        y=alt.Y("measure:N", title=None, sort=None, axis=alt.Axis(labelLimit=240, grid=True)),
        yOffset=alt.YOffset("who:N", sort=None),
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
        rows,
        wide=several,
    )


def _exam_name(name: str) -> str:
    return EXAM_NAMES.get(name, name).removeprefix("exam: ")


def _bars(runs: Sequence[Run], rows: list[dict[str, Any]], kinds: Sequence[str], unit: str) -> Any:
    steps = list(dict.fromkeys(row["step"] for row in rows))
    several = len(runs) > 1
    chart = (
        alt.Chart(_ROWS)
        .mark_bar(height={"band": 0.8})
        .encode(
            x=alt.X("value:Q", title=unit, axis=alt.Axis(tickCount=5, format="~s")),
            y=alt.Y("step:N", title=None, sort=None, axis=alt.Axis(labelLimit=200)),
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
        chart = chart.encode(yOffset=alt.YOffset("run:N", sort=None))
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
            f"{_whose(run, runs)}{sum(run.totals['tokens'].values()):,.0f} "
            f"tokens written, {sum(run.totals['prefilled'].values()):,.0f} read first"
            for run in runs
        )
        if len(runs) > 1:
            says += "; each step's bars are the runs in this order"
        figures.append(
            _figure("Tokens by step", f"{says}.", chart, tokens, table=steps_table(runs))
        )
    if seconds:
        says = "; ".join(
            f"{_whose(run, runs)}{run.totals['seconds']['total']:,.0f} seconds in all, with "
            "what the steps do not count"
            for run in runs
        )
        chart = _bars(runs, seconds, ["seconds"], "seconds")
        figures.append(_figure("Time by step", f"{says}.", chart, seconds))
    return figures


def _whose(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


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


def _pareto_figure(pareto: Mapping[str, Any], cost: str, loss: str) -> Figure:
    rows = [
        {
            "cost": point["cost"][cost],
            "loss": point["losses"][loss],
            "stop_threshold": point["stop_threshold"],
            "kind": kind_of(point),
            "product rule": "yes" if point["stop_threshold"] == pareto["product_rule"] else "no",
        }
        for point in pareto["points"]
        if cost in point["cost"] and loss in point["losses"]
    ]
    best = next((row for row in rows if row["kind"] == KINDS[0]), None)
    good = sum(row["kind"] != KINDS[2] for row in rows)
    says = f"{len(rows)} stopping thresholds, {good} of them on the frontier."
    if best:
        says += (
            f" Recommended: {best['stop_threshold']:g}, at {best['cost']:,.4g} "
            f"{cost.replace('_', ' ')} a {loss} loss of {best['loss']:.3g}."
        )
    return _figure(f"{loss} loss against the cost", says, _layered(*loss_layers(_ROWS, cost)), rows)


def system_figure(found: Mapping[str, Any]) -> Figure | None:
    """The systems of an evaluation set beside each other in its main measure, with intervals."""
    measure = next(iter(measures_of(found)), "")
    rows = [
        {"system": system["label"], **system["measures"][measure]}
        for system in found["systems"]
        if system["measures"].get(measure, {}).get("value") is not None
    ]
    if not rows:
        return None
    share = is_share(measure)
    form = ".1%" if share else ".3f"
    base = alt.Chart(_ROWS).encode(
        y=alt.Y("system:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
        tooltip=[
            "system:N",
            alt.Tooltip("value:Q", format=form),
            alt.Tooltip("low:Q", format=form),
            alt.Tooltip("high:Q", format=form),
            "n:Q",
        ],
    )
    axis = alt.Axis(format="%", tickCount=6) if share else alt.Axis(tickCount=6)
    scale = alt.Scale(domain=[0, 1]) if share else alt.Scale(zero=False)
    chart = base.mark_rule(strokeWidth=2, color=PAGE.series[0]).encode(
        x=alt.X("low:Q", title=None, axis=axis, scale=scale), x2="high:Q"
    ) + base.mark_point(filled=True, size=80, opacity=1, color=PAGE.series[0]).encode(x="value:Q")
    name = shown_name(measure).removesuffix(", %")
    says = "Points are the systems' values, lines 95 % intervals."
    return _figure(
        f"{found['name']}: {name}",
        says,
        chart.properties(height=28 * len(rows)),
        rows,
        wide=True,
    )
