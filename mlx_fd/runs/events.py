"""What a run tells whoever watches it. The display is a view of these; a run needs no display.

``str`` of an event is a line to print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.metrics import MetricsRow
from mlx_fd.runs.records.self_distillation import (
    AttemptRow,
    SelfHeadroomRow,
    SelfMetricsRow,
    SelfSummary,
)
from mlx_fd.runs.records.summary import HeadroomRow


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
class Probing:
    """The first probe evaluation goes on, before the first batch.

    Attributes:
        done: problems evaluated so far.
        total: problems to evaluate, each as often as the evaluation does.
    """

    done: int
    total: int

    def __str__(self) -> str:
        return f"first probe evaluation: {self.done}/{self.total} problems"


@dataclass(frozen=True)
class Started:
    """The batches begin, or go on after a resume.

    Attributes:
        done: episodes done before, as in :class:`BatchDone`.
        total: episodes of the run, times its epochs.
    """

    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.done}/{self.total} episodes done before"


@dataclass(frozen=True)
class Probed:
    """The result of the first probe evaluation, reported again at resuming."""

    first: Mapping[str, float]
    last: Mapping[str, float]
    headroom: HeadroomRow | SelfHeadroomRow

    def __str__(self) -> str:
        return f"probe set: {_losses(self.last)}"


@dataclass(frozen=True)
class BatchDone:
    """A batch is done and on the disk.

    Attributes:
        done: episodes so far, in a later epoch those of the epochs before it too.
        total: episodes of the run, times its epochs.
        rows: this batch's rows of ``episodes.jsonl`` (none in a later epoch), of self-distillation
            those of ``attempts.jsonl``.
        metrics: its row of ``metrics.jsonl``.
    """

    done: int
    total: int
    rows: Sequence[EpisodeRow] | Sequence[AttemptRow]
    metrics: MetricsRow | SelfMetricsRow

    def __str__(self) -> str:
        updates = len(self.metrics["updates"])
        probe = self.metrics["probe"]
        return f"{self.done}/{self.total} episodes, {updates} updates in this batch" + (
            f"; probe set: {_losses(probe)}" if probe else ""
        )


@dataclass(frozen=True)
class WarmedUp:
    """The warm-up is over, in this process or before; what follows is the loop's."""

    summary: SelfSummary

    def __str__(self) -> str:
        sides = self.summary["held_out"]
        if not sides["after"]["n"]:
            return "warm-up done"
        return (
            f"warm-up done: held-out problems right: {sides['before']['right']} before, "
            f"{sides['after']['right']} after, of {sides['after']['n']}"
        )


def _losses(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


Event = Note | Warned | Step | Probing | Probed | Started | BatchDone | WarmedUp
