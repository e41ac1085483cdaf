"""What a run tells whoever watches it. The display is a view of these; a run needs no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_fd.runs.records import (
    AttemptRow,
    EpisodeRow,
    HeadroomRow,
    MetricsRow,
    SelfHeadroomRow,
    SelfMetricsRow,
)


@dataclass(frozen=True)
class Note:
    """Something to know."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something to worry about."""

    text: str


@dataclass(frozen=True)
class Step:
    """Some tokens of a step were written or learned from."""

    batch: int
    step: str
    tokens: int


@dataclass(frozen=True)
class Probed:
    """The probe set was looked at before the first batch, or at resuming."""

    first: Mapping[str, float]
    last: Mapping[str, float]
    headroom: HeadroomRow | SelfHeadroomRow


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


Event = Note | Warned | Step | Probed | BatchDone
