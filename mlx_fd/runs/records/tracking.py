"""What a tracker has of a run: ``tracking.json``."""

from __future__ import annotations

from typing import TypedDict


class TrackerRow(TypedDict):
    """Of ``tracking.json``, which has one for each tracker: what it has of the run.

    Attributes:
        id: the run's id there.
        step: the last step that was written to it; -1: none.
    """

    id: str
    step: int
