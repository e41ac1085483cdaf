"""The chart of trust: how often the expert is asked along a run, and what comes of not asking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from mlx_fd.report import drawing as draw
from mlx_fd.report.drawing import Figure
from mlx_fd.report.reading import LoopRun
from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.summary import agreed, mean_feedback, share_saved, wilson

ALONE, TOKENS, DIFFER, RIGHT = (
    "expert not asked",
    "expert's feedback tokens, of always asking",
    "audited verdicts that differ",
    "final answers right",
)


def trust_figure(run: LoopRun) -> Figure | None:
    """Coverage, tokens, observed disagreement and accuracy along a run; ``None``: no episodes."""
    if not run.episodes:
        return None
    mean = mean_feedback(run.episodes)
    rows = [row for chunk in draw.binned(run.episodes) for row in _points(chunk, mean)]
    kinds = [
        kind for kind in (ALONE, TOKENS, DIFFER, RIGHT) if any(r["what"] == kind for r in rows)
    ]
    base = alt.Chart(draw.ROWS).encode(
        x=alt.X("episode:Q", title="episodes", axis=alt.Axis(grid=False, format="d")),
        y=alt.Y("share:Q", title=None, axis=alt.Axis(format="%")),
        color=draw.colour("what", kinds),
        tooltip=draw.tips(
            "what:N",
            *(alt.Tooltip(f"{key}:Q", format=".1%") for key in ("share", "low", "high")),
            "n:Q",
        ),
    )
    return draw.figure(
        "Trust along the run",
        _says(run),
        draw.layered(draw.with_points(base, ("what",))),
        rows,
    )


def _points(chunk: Sequence[EpisodeRow], mean: float) -> list[dict[str, Any]]:
    """What some episodes in a row show, where they show it."""
    audits = [same for row in chunk if row["gate"]["trusted"] and (same := agreed(row)) is not None]
    right = [known for row in chunk if (known := row["correct_after"]) is not None]
    counted = (
        (ALONE, sum(row["expert_feedback"] is None for row in chunk), len(chunk)),
        (DIFFER, len(audits) - sum(audits), len(audits)),
        (RIGHT, sum(right), len(right)),
    )
    at = {"episode": (chunk[0]["episode"] + chunk[-1]["episode"]) / 2}
    found: list[dict[str, Any]] = []
    for what, k, n in counted:
        if n:
            low, high = wilson(k, n)
            found.append({**at, "what": what, "share": k / n, "low": low, "high": high, "n": n})
    saved = share_saved(chunk, mean)
    if mean and saved is not None:
        found.append({**at, "what": TOKENS, "share": 1 - saved, "n": len(chunk)})
    return found


def _says(run: LoopRun) -> str:
    feedback = run.totals["expert_feedback"]
    saved, audits = feedback["share_saved"], feedback["audits"]
    allowed = run.manifest["options"].get("max_disagreement")
    text = f"The expert was not asked in {feedback['not_asked']} of {len(run.episodes)} episodes"
    if saved is not None:
        text += f", which saves about {saved:.1%} of its feedback tokens"
    if audits["n"]:
        low, high = audits["interval"]
        share = audits["disagreed"] / audits["n"]
        text += (
            f". Where it need not be asked, {audits['disagreed']} of {audits['n']} audited "
            f"verdicts differ ({share:.1%}, 95 % {low:.1%} to {high:.1%})"
        )
    if not allowed:
        return f"{text}."
    return (
        f"{text}. Of the verdicts that the student gives alone at most {allowed * 100:g} % may "
        "differ from the expert's."
    )
