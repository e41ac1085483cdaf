"""What a run's batches came to: ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict, final

from mlx_fd.runs.records.parts import CountRow


class UpdateRow(TypedDict):
    """One optimiser step.

    Attributes:
        losses: mean losses before the step, by name; null where not finite.
        total: the weighted sum that was minimised; null where not finite.
        gradient_norm: before clipping; null where not finite.
        skipped: loss or gradient was not finite, and nothing was changed.
        tokens: tokens that the student read.
    """

    losses: Mapping[str, float | None]
    total: float | None
    gradient_norm: float | None
    skipped: bool
    tokens: int


class StopRow(TypedDict):
    """What a probe evaluation led to.

    Attributes:
        action: ``train``, ``freeze`` or ``thaw``.
        reason: why, in words and numbers.
        gains: 1 - EMA / first value of each loss.
        weights: what each loss counts from then on; sum 1.
    """

    action: str
    reason: str
    gains: Mapping[str, float]
    weights: Mapping[str, float]


class TrustRow(TypedDict):
    """Where the student needs no expert, and the audited verdicts that this rests on.

    Attributes:
        threshold: the confidence from which on it needs none; null: it always does.
        coverage: share of the audited verdicts that count that reach it.
        audited: how many reach it.
        disagreed: those of them that differed from the expert's.
        bound: of the share that differs, with 95 % probability; 1 where there is no threshold.
    """

    threshold: float | None
    coverage: float
    audited: int
    disagreed: int
    bound: float


class BatchMetricsRow(TypedDict):
    """What a line of ``metrics.jsonl`` has in both kinds of run: one batch.

    Attributes:
        batch: its index, from 0, over all epochs.
        lagging: samples (attempts) that the student was to learn from.
        weights: what each loss counted; sum 1. Empty in self-distillation.
        updates: the optimiser steps.
        probe: losses on the probe set; null where it was not evaluated after this batch.
        stop: what the gate made of them; null likewise.
        frozen: whether the gate has stopped distillation.
        distil_seconds: seconds of the optimiser steps.
        seconds: seconds of the whole batch.
    """

    batch: int
    lagging: int
    weights: Mapping[str, float]
    updates: list[UpdateRow]
    probe: Mapping[str, float] | None
    stop: StopRow | None
    frozen: bool
    distil_seconds: float
    seconds: float


class AmountRow(TypedDict):
    """Tokens or steps.

    Attributes:
        done: how many there were.
        least: how few there could have been.
    """

    done: int
    least: int


class WorkRow(TypedDict):
    """What was done beside the least that there could have been (``profile``).

    Attributes:
        counts: tokens of prompts that each model read (``expert_prompts``, ``student_prompts``),
            ``steps`` of writing and their places (``written``), tokens that the expert read of
            what is learned from (``expert_texts``), that the student's losses were measured on
            before (``measured``) and that it learned from (``learned``).
        seconds: by part of the work: ``writing``, ``reading``, ``measuring``, ``learning`` and
            ``other``.
        processor_seconds: likewise, of all processors of rank 0's process.
    """

    counts: Mapping[str, AmountRow]
    seconds: Mapping[str, float]
    processor_seconds: Mapping[str, float]


@final
class MetricsRow(BatchMetricsRow):
    """A line of ``metrics.jsonl`` of the loop.

    Attributes:
        trust: where the student needs no expert, after this batch.
        expert_tokens: tokens of the expert's feedbacks in this batch.
        expert_verdicts: how many of the expert's scores had each outcome against the right answers;
            absent in later epochs and in runs of older versions.
        answer_temperature: of this batch's answers; null in a later epoch.
        work: with ``profile``: what this batch did beside the least; absent in a later epoch.
        accepted: with ``speculate``: of the tokens that the expert wrote with a draft, those that
            the student had proposed; absent where there were none.
    """

    trust: TrustRow
    expert_tokens: int
    expert_verdicts: NotRequired[Mapping[str, int]]
    answer_temperature: float | None
    work: NotRequired[WorkRow]
    accepted: NotRequired[CountRow]
