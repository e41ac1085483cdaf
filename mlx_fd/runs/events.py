"""What a run tells whoever watches it. The display is a view of these; a run needs no display.

``str`` of an event is a line to print.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Note:
    """Something to know."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Warned:
    """Something to worry about."""

    text: str

    def __str__(self) -> str:
        return f"warning: {self.text}"


@dataclass(frozen=True)
class Step:
    """Some tokens of a step were written or learned from."""

    batch: int
    step: str
    tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch + 1}: {self.step.replace('_', ' ')}, {self.tokens} tokens"


@dataclass(frozen=True)
class Probed:
    """The probe set was looked at before the first batch, or at resuming."""

    first: dict[str, float]
    last: dict[str, float]
    headroom: dict[str, int]

    def __str__(self) -> str:
        return f"probe set: {_losses(self.last)}"


@dataclass(frozen=True)
class BatchDone:
    """A batch is done and on the disk.

    Attributes:
        done: episodes so far, in a later epoch those of the epochs before it too.
        total: episodes of the run, times its epochs.
        rows: this batch's rows of ``episodes.jsonl``; none in a later epoch.
        metrics: its row of ``metrics.jsonl``.
    """

    done: int
    total: int
    rows: list[dict[str, Any]]
    metrics: dict[str, Any]

    def __str__(self) -> str:
        updates = len(self.metrics["updates"])
        probe = self.metrics["probe"]
        return (
            f"{self.done}/{self.total} episodes: {self.metrics['lagging']} of this batch learned "
            f"from in {updates} updates" + (f"; probe set: {_losses(probe)}" if probe else "")
        )


def _losses(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


Event = Note | Warned | Step | Probed | BatchDone
