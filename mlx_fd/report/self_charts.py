"""The charts of runs of self-distillation: rows in, Vega-Lite specifications out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import altair as alt

from mlx_fd.report import drawing as draw
from mlx_fd.report.charts import loss_figure
from mlx_fd.report.drawing import Figure
from mlx_fd.report.run import Run
from mlx_fd.report.self_reading import SelfRun
from mlx_fd.report.self_tables import STEP_NAMES, share_says
from mlx_fd.runs.records.self_distillation import SelfMetricsRow
from mlx_fd.runs.self_distillation_summary import WRONG
from mlx_fd.runs.summary import wilson

Values = Mapping[str, Callable[[SelfMetricsRow], float | None]]


def held_out_figure(runs: Sequence[SelfRun]) -> Figure | None:
    """Held-out problems that are answered right, by batch."""
    rows = [
        {"run": run.name, "batch": batch, "right": 1 - wrong, "low": low, "high": high, "n": n}
        for run in runs
        if (headroom := run.totals["headroom"]) and (n := headroom["problems"])
        for batch, wrong in _held_out(run).items()
        for low, high in [wilson(round((1 - wrong) * n), n)]
    ]
    if not rows:
        return None
    several = len(runs) > 1
    base = alt.Chart(draw.ROWS).encode(
        x=draw.along(runs),
        y=alt.Y("right:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        color=draw.colour("run", [run.name for run in runs], shown=several),
        tooltip=draw.tips(
            "run:N",
            "batch:Q",
            *(alt.Tooltip(f"{key}:Q", format=".1%") for key in ("right", "low", "high")),
            "n:Q",
        ),
    )
    series = ("run",)
    says = "; ".join(
        f"{draw.whose(run, runs)}{share_says(found['before'])} before, "
        f"{share_says(found['after'])} after"
        for run in runs
        for found in [run.totals["held_out"]]
    )
    how = "Pointing at a point gives its" if several else "The band is the"
    return draw.figure(
        "Held-out problems answered right",
        f"{says}. {how} 95 % Wilson interval.",
        draw.layered(
            None if several else draw.band(base, series),
            draw.with_points(base, series),
            draw.rules(),
        ),
        rows,
        marks=draw.marks(runs),
    )


def _held_out(run: SelfRun) -> dict[int, float]:
    """The share of held-out problems answered wrong, by batches done."""
    found = {0: run.probe_first} | {
        row["batch"] + 1: row["probe"] for row in run.metrics if row["probe"]
    }
    if run.finished and run.metrics:
        found[run.metrics[-1]["batch"] + 1] = run.totals["probe"]["after"]
    return {batch: losses[WRONG] for batch, losses in found.items() if WRONG in losses}


def update_figures(runs: Sequence[Run]) -> list[Figure]:
    """Each part of what is minimised, as it was in the updates."""
    names = dict.fromkeys(
        name
        for run in runs
        for row in run.metrics
        for up in row["updates"]
        for name in up["losses"]
    )
    return [found for name in names if (found := loss_figure(runs, name))]


def attempt_figures(runs: Sequence[SelfRun]) -> list[Figure]:
    """What the attempts were like, batch by batch."""
    found = [
        draw.accuracy_along(
            "Attempts that are right",
            " ".join(
                f"{draw.whose(run, runs)}{share_says(run.totals['first_half'])} in the first "
                f"half, {share_says(run.totals['second_half'])} in the second."
                for run in runs
            ),
            {run.name: [row for row in run.attempts if not row.get("by_expert")] for run in runs},
            "attempt",
            lambda row: row["attempt"],
            {"attempts": lambda row: row["correct"]},
        ),
        _by_batch(
            runs,
            "Attempts trained on, and finished",
            "Attempts with a training signal, and attempts that ended before the token limit.",
            {
                "trained on": lambda row: row["attempts"]["teaches"],
                "finished": lambda row: row["attempts"]["finished"],
            },
            share=True,
        ),
        _by_batch(
            runs,
            "Token advantage",
            "log p(token | question, context) - log p(token | question) in nats: "
            "absolute value, mean over attempts.",
            {"mean |A|": lambda row: row["attempts"]["mean_abs_advantage"]},
        ),
        _by_batch(
            runs,
            "Negative advantage on right attempts",
            "Fraction of the tokens of right attempts with a negative advantage.",
            {"negative": lambda row: row["attempts"]["negative_on_right"]},
            share=True,
        ),
        _by_batch(
            runs,
            "Entropy of the student",
            "Nats per token, mean over attempts; near 0 there is no exploration.",
            {"entropy": lambda row: row["attempts"]["entropy"]},
        ),
        _by_batch(
            runs,
            "Distance to the teacher",
            _nearness_says(runs),
            {"KL(student, teacher)": lambda row: _of_health(row, "reverse_kl")},
        ),
        _by_batch(
            runs,
            "Likeliest tokens shared with the teacher",
            "Fraction of the teacher's likeliest tokens that are among as many of the student's, "
            "mean over tokens.",
            {"shared": lambda row: _of_health(row, "overlap")},
            share=True,
        ),
        position_figure(runs),
        _by_batch(
            runs,
            "Length of attempts",
            "Mean, in tokens.",
            {"tokens": lambda row: row["attempts"]["tokens"]},
        ),
    ]
    if any(any(row["clipped"]) for run in runs for row in run.metrics):
        found.append(
            _by_batch(
                runs,
                "Clipped ratios",
                "Fraction of tokens whose policy ratio left the clipping range.",
                {"clipped": lambda row: max(row["clipped"], default=None)},
                share=True,
            )
        )
    return [it for it in found if it]


def _of_health(row: SelfMetricsRow, name: Literal["overlap", "reverse_kl"]) -> float | None:
    return row["health"][name] if "health" in row else None


def _nearness_says(runs: Sequence[SelfRun]) -> str:
    says = "; ".join(
        f"{draw.whose(run, runs)}{found['first']['reverse_kl']:.3g} in the first quarter of the "
        f"batches, {found['last']['reverse_kl']:.3g} in the last"
        for run in runs
        if (found := run.totals.get("health"))
    )
    return f"KL(student, teacher) in nats per token, before each update: {says}."


def position_figure(runs: Sequence[SelfRun]) -> Figure | None:
    """Where in an attempt student and teacher differ: in the run's first quarter and its last."""
    quarters: dict[Literal["first", "last"], str] = {
        "first": "first quarter",
        "last": "last quarter",
    }
    rows = [
        {
            "run": run.name,
            "batches": name,
            "position": place["first"],
            "tokens": place["tokens"],
            "KL": place["reverse_kl"],
        }
        for run in runs
        if (health := run.totals.get("health"))
        for key, name in quarters.items()
        for place in health[key]["positions"]
    ]
    if not rows:
        return None
    several = len(runs) > 1
    base = alt.Chart(draw.ROWS).encode(
        x=alt.X("position:O", title="position in the attempt, from", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("KL:Q", title=None, scale=alt.Scale(domainMin=0)),
        color=draw.colour("run", [run.name for run in runs])
        if several
        else draw.colour("batches", list(quarters.values())),
        strokeDash=draw.dash("batches", list(quarters.values()), [[4, 3], [1, 0]]),
        tooltip=draw.tips(
            "run:N", "batches:N", "position:O", alt.Tooltip("KL:Q", format=".4g"), "tokens:Q"
        ),
    )
    return draw.figure(
        "Distance to the teacher by position",
        "KL(student, teacher) in nats per token, by where in the attempt a token is.",
        draw.layered(draw.with_points(base, ("run", "batches"))),
        rows,
    )


def _by_batch(
    runs: Sequence[SelfRun], title: str, says: str, values: Values, *, share: bool = False
) -> Figure | None:
    """Statistics of the batches as lines; where there are several runs, a colour for each."""
    rows = [
        {"run": run.name, "batch": row["batch"] + 1, "what": what, "value": value}
        for run in runs
        for what, of in values.items()
        for row in run.metrics
        if (value := of(row)) is not None
    ]
    if not rows:
        return None
    several, form = len(runs) > 1, ".1%" if share else ".4g"
    colour = (
        draw.colour("run", [run.name for run in runs])
        if several
        else draw.colour("what", list(values), shown=len(values) > 1)
    )
    scale = alt.Scale(domain=[0, 1]) if share else alt.Scale(domainMin=0)
    base = alt.Chart(draw.ROWS).encode(
        x=draw.along(runs),
        y=alt.Y(
            "value:Q", title=None, scale=scale, axis=alt.Axis(format="%") if share else alt.Axis()
        ),
        color=colour,
        strokeDash=draw.dash(
            "what", list(values), [[1, 0], [4, 3]][: len(values)], shown=len(values) > 1
        ),
        tooltip=draw.tips("run:N", "what:N", "batch:Q", alt.Tooltip("value:Q", format=form)),
    )
    lines = draw.with_points(base, ("run", "what"), draw.every(runs))
    return draw.figure(title, says, draw.layered(lines), rows)


def budget_figures(runs: Sequence[SelfRun]) -> list[Figure]:
    """Tokens by what was done with them, seconds by step."""
    tokens = [
        {"run": run.name, "step": step, "kind": "tokens", "value": value}
        for run in runs
        for step, value in (
            ("generated in attempts", run.totals["tokens"]["attempt"]),
            ("prefilled", run.totals["tokens"]["prefilled"]),
            ("trained on", run.totals["updates"]["tokens"]),
        )
    ]
    seconds = [
        {"run": run.name, "step": STEP_NAMES[step], "kind": "seconds", "value": value}
        for run in runs
        for step, value in run.totals["seconds"].items()
        if step in STEP_NAMES
    ]
    if not any(run.metrics for run in runs):
        return []
    written = "; ".join(
        f"{draw.whose(run, runs)}{run.totals['tokens']['attempt']:,.0f} tokens generated, "
        f"{run.totals['updates']['tokens']:,.0f} trained on"
        for run in runs
    )
    lasted = "; ".join(
        f"{draw.whose(run, runs)}{run.totals['seconds']['total']:,.0f} seconds in all, with "
        "the probe evaluations"
        for run in runs
    )
    return [
        draw.figure("Tokens", f"{written}.", draw.bars(runs, tokens, ["tokens"], "tokens"), tokens),
        draw.figure(
            "Time by step", f"{lasted}.", draw.bars(runs, seconds, ["seconds"], "seconds"), seconds
        ),
    ]
