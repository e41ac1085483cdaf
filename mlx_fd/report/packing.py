"""Records (episodes, attempts) as they are kept in the page: packed, in parts.

A part is unpacked when one of its records is looked at.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.self_distillation import AttemptRow
from mlx_fd.runs.summary import good_by_expert

_Record = TypeVar("_Record")
# Records unpacked at once.
PART = 100
_LISTED = 140
# What the lists can be filtered by; episodes.js and attempts.js read the same numbers.
RIGHT_BEFORE, RIGHT_AFTER, UNREADABLE, ALONE, LEARNED, CAPPED = 1, 2, 4, 8, 16, 32
RIGHT, TEACHES, CUT, UNREAD, TOLD = 1, 2, 4, 8, 16
# Of problems without right answers: nobody knows; and the expert's verdict, where it gave one.
UNGRADED, GOOD, POOR = 64, 128, 256


def pack(value: Any) -> str:
    """A value as JSON, gzip and Base64: nothing in it means anything to HTML.

    A half of a surrogate pair, which UTF-8 does not have, becomes a question mark.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = gzip.compress(text.encode("utf-8", "replace"), compresslevel=9, mtime=0)
    return base64.b64encode(data).decode("ascii")


def script_json(value: Any) -> str:
    """A value as JSON that can stand in a ``<script>`` element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    # Without "<" neither an end tag nor a comment can begin.
    return text.replace("<", "\\u003c")


def listed_episode(row: EpisodeRow) -> list[Any]:
    """An episode's line in the list: number, id, beginning of the question, flags."""
    expert, student = row["expert_feedback"], row["student_feedback"]
    unreadable = student["written_score"] is None or (expert and expert["written_score"] is None)
    ungraded, good = row["correct_before"] is None, good_by_expert(row)
    flags = (
        RIGHT_BEFORE * bool(row["correct_before"])
        | RIGHT_AFTER * bool(row["correct_after"])
        | UNGRADED * ungraded
        | GOOD * (ungraded and good is True)
        | POOR * (ungraded and good is False)
        | UNREADABLE * bool(unreadable)
        | ALONE * (not expert)
        | LEARNED * row["gate"]["distilled"]
        | CAPPED * bool(row["capped"])
    )
    return [row["episode"], row["id"], _beginning(row["question"]), flags]


def listed_attempt(row: AttemptRow) -> list[Any]:
    """An attempt's line in the list: number, id, beginning of the question, flags."""
    flags = (
        RIGHT * bool(row["correct"])
        | UNGRADED * (row["correct"] is None)
        | TEACHES * row["teaches"]
        | CUT * (not row["finished"])
        | UNREAD * (row["final"] is None and row["correct"] is not None)
        | TOLD * (row["teacher"] is not None)
    )
    return [row["attempt"], row["id"], _beginning(row["question"]), flags]


def without_tokens(row: AttemptRow) -> dict[str, Any]:
    """An attempt with its length in its tokens' place: nobody reads their ids."""
    rest = {key: value for key, value in row.items() if key != "tokens"}
    return {**rest, "length": len(row["tokens"])}


def _beginning(question: str) -> str:
    return question[:_LISTED] + ("…" if len(question) > _LISTED else "")


def parts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The records, packed."""
    return [pack(rows[begin : begin + PART]) for begin in range(0, len(rows), PART)]


def spread(rows: Sequence[_Record], most: int | None) -> list[_Record]:
    """At most so many rows, evenly spread over all, the first and the last among them."""
    if most is None or most >= len(rows):
        return list(rows)
    if most == 1:
        return [rows[0]]
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]
