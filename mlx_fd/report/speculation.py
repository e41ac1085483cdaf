"""How much of what the expert wrote the student had proposed, as the report shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from mlx_fd.report import drawing as draw
from mlx_fd.report.drawing import Figure
from mlx_fd.report.reading import LoopRun
from mlx_fd.report.tables import NONE, Table, TableRow, estimate, table
from mlx_fd.runs.acceptance import ALL, accepted_share
from mlx_fd.runs.labels import STEP_NAMES
from mlx_fd.runs.records.parts import EstimateRow


def acceptance_table(runs: Sequence[LoopRun]) -> Table | None:
    """The shares of both halves of the runs, by step; ``None`` where no run had a draft."""
    found = {run.name: run.totals.get("acceptance", {}) for run in runs}
    steps = [step for step in (*STEP_NAMES, ALL) if any(step in of for of in found.values())]
    if not steps:
        return None
    rows: list[TableRow] = [
        (
            "all of them" if step == ALL else STEP_NAMES[step],
            *(
                estimate(half, ".1%")
                for of in found.values()
                for half in (
                    (of[step]["first_half"], of[step]["second_half"]) if step in of else (None,) * 2
                )
            ),
        )
        for step in steps
    ]
    columns = [
        f"{name}: {half}" if len(found) > 1 else half
        for name in found
        for half in ("first half", "second half")
    ]
    return table(
        "Of the tokens that the expert wrote, those that the student had proposed, in both halves "
        "of the episodes",
        ("", *columns),
        rows,
    )


def acceptance_figure(runs: Sequence[LoopRun]) -> Figure | None:
    """The share of all steps along the runs, with intervals; ``None`` likewise."""
    rows: list[dict[str, Any]] = []
    drafted = [run for run in runs if "acceptance" in run.totals]
    for run in drafted:
        for chunk in draw.binned([row for row in run.episodes if row.get("accepted")]):
            share = accepted_share(chunk)
            if share["value"] is not None:
                middle = (chunk[0]["episode"] + chunk[-1]["episode"]) / 2
                rows.append({"run": run.name, "episode": middle, **share})
    if not rows:
        return None
    base = alt.Chart(draw.ROWS).encode(
        x=alt.X("episode:Q", title="episodes", axis=alt.Axis(grid=False, format="d")),
        y=alt.Y("value:Q", title=None, axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        color=draw.colour("run", [run.name for run in drafted], shown=len(drafted) > 1),
        tooltip=draw.tips(
            "run:N",
            *(alt.Tooltip(f"{key}:Q", format=".1%") for key in ("value", "low", "high")),
            alt.Tooltip("n:Q", title="episodes"),
        ),
    )
    halves = [
        f"{draw.whose(run, runs)}{_share(of['first_half'])} in the first half of the episodes, "
        f"{_share(of['second_half'])} in the second"
        for run in drafted
        for of in (run.totals["acceptance"][ALL],)
    ]
    return draw.figure(
        "Tokens of the expert that the student had proposed",
        f"{'; '.join(halves)}. Each point is a sixteenth of its run, with its 95 % interval.",
        draw.layered(draw.band(base, ("run",)), draw.with_points(base, ("run",))),
        rows,
        table=acceptance_table(runs),
    )


def _share(value: EstimateRow) -> str:
    return NONE if value["value"] is None else f"{value['value']:.1%}"
