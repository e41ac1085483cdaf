"""How much of what an expert wrote its draft had proposed. Rows in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.parts import CountRow, EstimateRow
from mlx_fd.runs.records.summary import AcceptanceRow
from mlx_fd.runs.summary import wilson_over_clusters

ALL = "all"
"""All steps of an episode together."""


def accepted_count(rows: Sequence[EpisodeRow]) -> CountRow:
    """Tokens that the student had proposed, of those that the expert wrote with a draft."""
    counts = _counts(rows, ALL)
    return {"count": sum(count for count, _ in counts), "n": sum(n for _, n in counts)}


def accepted_share(rows: Sequence[EpisodeRow], step: str = ALL) -> EstimateRow:
    """The share of these in a step, with its interval; n is the number of episodes."""
    counts = _counts(rows, step)
    total = sum(n for _, n in counts)
    if not total:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = wilson_over_clusters(counts)
    share = sum(count for count, _ in counts) / total
    return {
        "value": round(share, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "n": len(counts),
    }


def acceptance(rows: Sequence[EpisodeRow]) -> dict[str, AcceptanceRow]:
    """The shares by step, and of all steps; empty where nothing was written with a draft."""
    steps = list(dict.fromkeys(step for row in rows for step in row.get("accepted", ())))
    found: dict[str, AcceptanceRow] = {}
    for step in (*steps, ALL) if steps else ():
        of = [row for row in rows if _counts([row], step)]
        half = len(of) // 2
        found[step] = {
            "whole": accepted_share(of, step),
            "first_half": accepted_share(of[:half], step),
            "second_half": accepted_share(of[half:], step),
        }
    return found


def _counts(rows: Sequence[EpisodeRow], step: str) -> list[tuple[int, int]]:
    """Tokens that were proposed and tokens that were written, of each episode with any."""
    found = []
    for row in rows:
        accepted, written = row.get("accepted", {}), row["tokens"]
        steps = [one for one in accepted if step in (one, ALL) and one in written]
        if steps:
            count = sum(accepted[one] for one in steps)
            found.append((count, sum(written[one] for one in steps)))
    return found
