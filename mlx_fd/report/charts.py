"""The charts of runs of the loop: rows in, Vega-Lite specifications out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from mlx_fd.evaluation.names import is_share, shown_name
from mlx_fd.evaluation.pareto.names import KINDS, kind_of
from mlx_fd.report import drawing as draw
from mlx_fd.report.drawing import Figure
from mlx_fd.report.frontier import loss_layers
from mlx_fd.report.reading import LoopRun
from mlx_fd.report.run import Run
from mlx_fd.report.tables import amount, losses_table, measures_of, steps_table
from mlx_fd.report.theme import PAGE
from mlx_fd.runs.labels import EXAM_NAMES, STEP_NAMES
from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.parts import ShareRow
from mlx_fd.runs.self_distillation_summary import WRONG
from mlx_fd.runs.summary import good_by_expert

# What gains, where its name alone does not say it.
_GAINING = {WRONG: "problems answered wrong"}
_LOOKS = ("held out", "training")


def loss_figures(runs: Sequence[Run]) -> list[Figure]:
    """One chart for each loss: on the probe set, and in the updates."""
    losses = list(
        dict.fromkeys(name for run in runs for row in run.metrics for name in row["weights"])
    )
    return [figure for name in losses if (figure := loss_figure(runs, name))]


def loss_figure(runs: Sequence[Run], loss: str) -> Figure | None:
    """One loss: on the probe set, and in the updates."""
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
            for on, curve in zip(_LOOKS, (held_out, learned), strict=True)
            for batch, value in curve
            if value is not None
        ]
    if not rows:
        return None
    kinds = [on for on in _LOOKS if any(row["on"] == on for row in rows)]
    base = alt.Chart(draw.ROWS).encode(
        x=draw.along(runs),
        y=alt.Y("loss:Q", title=None, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5)),
        color=draw.colour("run", [run.name for run in runs])
        if len(runs) > 1
        else draw.colour("on", _LOOKS, shown=len(kinds) > 1),
        strokeDash=draw.dash("on", _LOOKS, [[1, 0], [4, 3]], shown=len(kinds) > 1),
        tooltip=draw.tips("run:N", "on:N", "batch:Q", alt.Tooltip("loss:Q", format=".4g")),
    )
    return draw.figure(
        f"{loss} loss",
        _loss_says(runs, loss),
        draw.layered(draw.with_points(base, ("run", "on"), draw.every(runs)), draw.rules()),
        rows,
        marks=draw.marks(runs),
        table=losses_table(runs, loss) if "held out" in kinds else None,
    )


def _loss_says(runs: Sequence[Run], loss: str) -> str:
    parts = []
    for run in runs:
        first = run.totals["probe"]["before"].get(loss)
        last = run.totals["probe"]["after"].get(loss)
        if first and last is not None:
            parts.append(
                f"{draw.whose(run, runs)}{first:.3g} to {last:.3g} on held-out problems "
                f"({last / first - 1:+.0%})"
            )
    return "; ".join(parts) + "." if parts else "In the last update of each batch."


def weight_figure(run: Run) -> Figure | None:
    """What each loss counted, by batch."""
    rows: list[dict[str, Any]] = [
        {"batch": row["batch"] + 1, "loss": name, "weight": value}
        for row in run.metrics
        for name, value in row["weights"].items()
    ]
    if not rows:
        return None
    names = list(dict.fromkeys(row["loss"] for row in rows))
    base = alt.Chart(draw.ROWS).encode(
        x=draw.along([run]),
        y=alt.Y("weight:Q", title=None, scale=alt.Scale(domainMin=0)),
        color=draw.colour("loss", names),
        tooltip=draw.tips("loss:N", "batch:Q", alt.Tooltip("weight:Q", format=".3f")),
    )
    last = run.metrics[-1]["weights"]
    says = "At the end: " + ", ".join(f"{name} {value:.2f}" for name, value in last.items()) + "."
    return draw.figure(
        "Weights of the losses",
        says,
        draw.layered(draw.with_points(base, ("loss",), draw.every([run])), draw.rules()),
        rows,
        marks=draw.marks([run]),
    )


def gain_figure(run: Run) -> Figure | None:
    """How far each loss has fallen as the gate sees it; see :func:`no_gains`."""
    looks = [
        (row["batch"] + 1, gains)
        for row in run.metrics
        if row["stop"] and (gains := _known_gains(run, row["stop"]["gains"]))
    ]
    if not looks:
        return None
    names = list(dict.fromkeys(name for _, gains in looks for name in gains))
    # Gains are against the look before the first update, of which each gain is 0.
    rows = [
        {"batch": batch, "loss": _GAINING.get(name, name), "gain": value}
        for batch, gains in [(0, dict.fromkeys(names, 0.0)), *looks]
        for name, value in gains.items()
    ]
    names = [_GAINING.get(name, name) for name in names]
    base = alt.Chart(draw.ROWS).encode(
        x=draw.along([run]),
        y=alt.Y("gain:Q", title=None, axis=alt.Axis(format="%")),
        color=draw.colour("loss", names),
        tooltip=draw.tips("loss:N", "batch:Q", alt.Tooltip("gain:Q", format=".1%")),
    )
    threshold = run.manifest["options"].get("stop_threshold")
    line, above = None, ""
    if isinstance(threshold, (int, float)) and threshold < 1:
        line = (
            alt.Chart(draw.inline([{"threshold": threshold}]))
            .mark_rule(color=PAGE.soft)
            .encode(
                y=alt.Y("threshold:Q"),
                tooltip=draw.tips(alt.Tooltip("threshold:Q", title="stop_threshold")),
            )
        )
        above = f" The line is stop_threshold, {threshold:g}."
    last = ", ".join(
        f"{_GAINING.get(name, name)} {gain:.0%}" for name, gain in looks[-1][1].items()
    )
    says = f"Smoothed fall as a fraction of the initial value. At the last evaluation: {last}"
    marks = "".join(
        f" {m['what'].capitalize()} after batch {m['batch']}: {m['reason']}."
        for m in draw.marks([run])
    )
    return draw.figure(
        "Gains on the probe set",
        f"{says}.{above}{marks}",
        draw.layered(draw.with_points(base, ("loss",), draw.every([run])), line, draw.rules()),
        rows,
        marks=draw.marks([run]),
    )


def _known_gains(run: Run, gains: Mapping[str, float]) -> dict[str, float]:
    """Without those of losses that were 0 at first, of which no part can have fallen."""
    return {name: gain for name, gain in gains.items() if run.probe_first.get(name, 1.0) > 0}


def no_gains(run: Run) -> str:
    """Why there is no chart of gains."""
    if not any(row["stop"] for row in run.metrics):
        return (
            "No gains yet: there was no probe evaluation between updates. There is one after every "
            "probe_every distilled batches."
        )
    return "No gains: the gate's losses were 0 before the first update and could not fall."


_DECISIONS = ("distilled", "not distilled", "student alone")


def _decision(row: EpisodeRow) -> str:
    if not row["expert_feedback"]:
        return _DECISIONS[2]
    return _DECISIONS[0] if row["gate"]["distilled"] else _DECISIONS[1]


def decision_figure(run: LoopRun) -> Figure | None:
    """What the gate decided for the episodes."""
    if not run.episodes:
        return None
    rows: list[dict[str, Any]] = []
    for chunk in draw.binned(run.episodes):
        below = 0
        for name in _DECISIONS:
            count = sum(_decision(row) == name for row in chunk)
            last = chunk[-1]["episode"]
            place = {"first": chunk[0]["episode"], "last": last, "end": last + 1}
            rows.append(
                {**place, "decision": name, "episodes": count, "from": below, "to": below + count}
            )
            below += count
    most = max(row["to"] for row in rows)
    base = (
        alt.Chart(draw.ROWS)
        .mark_rect(stroke=PAGE.back, strokeWidth=1)
        .encode(
            x=alt.X("first:Q", title="episodes", axis=alt.Axis(grid=False, format="d")),
            x2=alt.X2("end:Q"),
            y=alt.Y("from:Q", title=None, axis=alt.Axis(tickCount=min(5, most), format="d")),
            y2=alt.Y2("to:Q"),
            color=draw.colour("decision", _DECISIONS),
            tooltip=draw.tips(
                "decision:N",
                "episodes:Q",
                alt.Tooltip("first:Q", title="from episode"),
                alt.Tooltip("last:Q", title="to episode"),
            ),
        )
    )
    counts = {name: sum(_decision(row) == name for row in run.episodes) for name in _DECISIONS}
    says = (
        f"Of {len(run.episodes)} episodes: "
        + ", ".join(f"{n} {name}" for name, n in counts.items())
        + "."
    )
    return draw.figure("The gate, by episode", says, base.properties(height=draw.HEIGHT), rows)


def accuracy_figure(runs: Sequence[LoopRun]) -> Figure | None:
    """First and final answers that are right, along the run.

    Where no right answer is known: first answers that are good by the expert's verdict.
    """
    graded = [run for run in runs if "verdicts" not in run.totals]
    found = {run.name: run.episodes for run in runs}
    if not graded:
        return draw.accuracy_along(
            "First answers that are good by the expert's verdict, along the run",
            "No right answers are known; a score above 0 counts as good. "
            + " ".join(_verdict_says(run, len(runs) > 1) for run in runs),
            found,
            "episode",
            lambda row: row["episode"],
            {"first answers": good_by_expert},
        )
    return draw.accuracy_along(
        "Right answers along the run",
        " ".join(_accuracy_says(run, len(runs) > 1) for run in graded),
        found,
        "episode",
        lambda row: row["episode"],
        {
            "first answers": lambda row: row["correct_before"],
            "final answers": lambda row: row["correct_after"],
        },
    )


def _verdict_says(run: LoopRun, several: bool) -> str:
    found = run.totals["verdicts"]["first_answers"]
    share = f"{found['right'] / found['n']:.1%} of {found['n']}" if found["n"] else "none"
    return f"{run.name if several else 'Over all'}: {share}."


def _accuracy_says(run: LoopRun, several: bool) -> str:
    def share(value: ShareRow) -> str:
        return f"{value['right'] / value['n']:.1%}" if value["n"] else "-"

    whose = f"{run.name}: " if several else "Over all: "
    accuracy = run.totals["accuracy"]
    first, final = share(accuracy["first_answers"]), share(accuracy["final_answers"])
    return f"{whose}{first} of the first, {final} of the final answers."


def exam_figure(runs: Sequence[LoopRun]) -> Figure | None:
    """The examination before and after, with intervals."""
    rows: list[dict[str, Any]] = [
        {
            "run": run.name,
            "measure": EXAM_NAMES.get(name, name),
            "when": when,
            **found,
        }
        for run in runs
        for name, sides in run.totals.get("exam", {}).items()
        for when, found in (("before", sides["before"]), ("after", sides["after"]))
        if found["value"] is not None
    ]
    if not rows:
        return None
    several = len(runs) > 1
    rows = [
        {**row, "who": f"{row['run']}, {row['when']}" if several else row["when"]} for row in rows
    ]
    who = list(dict.fromkeys(row["who"] for row in rows))
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    base = alt.Chart(draw.ROWS).encode(
        y=alt.Y("measure:N", title=None, sort=None, axis=alt.Axis(labelLimit=240, grid=True)),
        yOffset=alt.YOffset("who:N", sort=None),
        color=draw.colour("who", who, beside=measures),
        tooltip=draw.tips(
            "measure:N",
            "who:N",
            alt.Tooltip("value:Q", format=".3f"),
            alt.Tooltip("low:Q", format=".3f"),
            alt.Tooltip("high:Q", format=".3f"),
            "n:Q",
        ),
    )
    chart = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=None, axis=alt.Axis(tickCount=6)), x2=alt.X2("high:Q")
    ) + base.mark_point(filled=True, size=70, opacity=1).encode(x=alt.X("value:Q"))
    step = 14 * len(who)
    says = "Points are the student's results on held-out questions, lines 95 % intervals."
    return draw.figure(
        "Examination before and after",
        says,
        chart.properties(height=len(measures) * step + 10),
        rows,
        wide=several,
    )


def budget_figures(runs: Sequence[LoopRun]) -> list[Figure]:
    """Tokens and seconds by step."""
    written, read = "generated", "prefilled"
    tokens = [
        {"run": run.name, "step": STEP_NAMES.get(step, step), "kind": kind, "value": value}
        for run in runs
        for kind, by_step in ((written, run.totals["tokens"]), (read, run.totals["prefilled"]))
        for step, value in by_step.items()
    ]
    tokens += [
        {"run": run.name, "step": STEP_NAMES["distil"], "kind": "trained on", "value": n}
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
        chart = draw.bars(runs, tokens, [written, read, "trained on"], "tokens")
        says = "; ".join(
            f"{draw.whose(run, runs)}{sum(run.totals['tokens'].values()):,.0f} "
            f"tokens generated, {sum(run.totals['prefilled'].values()):,.0f} prefilled"
            for run in runs
        )
        if len(runs) > 1:
            says += "; each step's bars are the runs in this order"
        figures.append(
            draw.figure("Tokens by step", f"{says}.", chart, tokens, table=steps_table(runs))
        )
    if seconds:
        says = "; ".join(
            f"{draw.whose(run, runs)}{run.totals['seconds']['total']:,.0f} seconds in all, "
            "including time outside the steps"
            for run in runs
        )
        chart = draw.bars(runs, seconds, ["seconds"], "seconds")
        figures.append(draw.figure("Time by step", f"{says}.", chart, seconds))
    return figures


def pareto_figures(run: LoopRun) -> list[Figure]:
    """Each held-out loss against the cost, over stopping thresholds."""
    if not run.pareto or not run.pareto["points"]:
        return []
    points = run.pareto["points"]
    cost = run.pareto["objectives"][0] if run.pareto["objectives"] else "expert_tokens"
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
            f" Recommended: {best['stop_threshold']:g}, at {amount(best['cost'])} "
            f"{cost.replace('_', ' ')} a {loss} loss of {best['loss']:.3g}."
        )
    return draw.figure(
        f"{loss} loss against the cost",
        says,
        draw.layered(*loss_layers(draw.ROWS, cost)),
        rows,
    )


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
    base = alt.Chart(draw.ROWS).encode(
        y=alt.Y("system:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
        tooltip=draw.tips(
            "system:N",
            alt.Tooltip("value:Q", format=form),
            alt.Tooltip("low:Q", format=form),
            alt.Tooltip("high:Q", format=form),
            "n:Q",
        ),
    )
    axis = alt.Axis(format="%", tickCount=6) if share else alt.Axis(tickCount=6)
    scale = alt.Scale(domain=[0, 1]) if share else alt.Scale(zero=False)
    chart = base.mark_rule(strokeWidth=2, color=PAGE.series[0]).encode(
        x=alt.X("low:Q", title=None, axis=axis, scale=scale), x2=alt.X2("high:Q")
    ) + base.mark_point(filled=True, size=80, opacity=1, color=PAGE.series[0]).encode(
        x=alt.X("value:Q")
    )
    name = shown_name(measure).removesuffix(", %")
    says = "Points are the systems' values, lines 95 % intervals."
    return draw.figure(
        f"{found['name']}: {name}",
        says,
        chart.properties(height=28 * len(rows)),
        rows,
        wide=True,
    )
