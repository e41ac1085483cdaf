"""What self-distillation leaves in the files of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict, final

from mlx_fd.runs.records.metrics import BatchMetricsRow
from mlx_fd.runs.records.parts import ProbeLossesRow, ShareRow


class AttemptsRow(TypedDict):
    """Statistics of some attempts; null where nothing is known.

    Attributes:
        n: how many.
        right: how many are right; null where no right answer is known.
        reward: mean reward.
        teaches: share that teaches.
        finished: share that ended itself.
        tokens: mean length in tokens.
        entropy: mean entropy in nats.
        mean_abs_advantage: mean of abs(A_t).
        negative_on_right: mean share of tokens with negative A_t on right attempts.
        logprob_gap: largest difference of a token's log-probability from when it was drawn.
    """

    n: int
    right: int | None
    reward: float | None
    teaches: float | None
    finished: float | None
    tokens: float | None
    entropy: float | None
    mean_abs_advantage: float | None
    negative_on_right: float | None
    logprob_gap: float | None


class PositionRow(TypedDict):
    """Tokens of attempts by their position.

    Attributes:
        first: the first position, from 0; the next row's is one past the last.
        tokens: how many there are.
        reverse_kl: their mean KL(student || teacher) in nats.
    """

    first: int
    tokens: int
    reverse_kl: float


class HealthRow(TypedDict):
    """How near student and teacher are, before the update: means over the tokens of attempts.

    Attributes:
        top_k: how many likeliest tokens are compared.
        tokens: tokens that the teacher read.
        overlap: share of the teacher's likeliest tokens that are among the student's.
        reverse_kl: KL(student || teacher) in nats.
        positions: the same by position in the attempt.
    """

    top_k: int
    tokens: int
    overlap: float
    reverse_kl: float
    positions: list[PositionRow]


class ExpertAnswersRow(TypedDict):
    """What the expert wrote in the student's place.

    Attributes:
        n: answers.
        right: how many are right; null where no right answer is known.
        taught: how many were learned from.
    """

    n: int
    right: int | None
    taught: int


@final
class SelfMetricsRow(BatchMetricsRow):
    """A line of ``metrics.jsonl`` of self-distillation.

    Attributes:
        attempts: statistics of the batch's attempts: of the student's, where it made some.
        expert_answers: what the expert wrote; absent where it wrote nothing.
        health: how near student and teacher are on the same attempts; absent where no teacher read
            them.
        clipped: of each optimiser step, the share of tokens whose ratio was clipped.
        prefilled: tokens read for the attempts.
        step_seconds: seconds by step: attempt, context, learn.
    """

    attempts: AttemptsRow
    expert_answers: NotRequired[ExpertAnswersRow]
    health: NotRequired[HealthRow]
    clipped: list[float]
    prefilled: int
    step_seconds: Mapping[str, float]


@final
class AttemptRow(TypedDict):
    """A line of ``attempts.jsonl``: one attempt of self-distillation.

    Attributes:
        attempt: its index in the run, from 0.
        id: the problem's.
        question: the problem's text as the student read it.
        reference: the right answer; null where none is known.
        text: the attempt.
        thought: what was thought before it; absent where nothing was.
        tokens: its token ids, without those of the thought.
        final: the final answer read in it; null where none could be read.
        correct: whether that is right; null where no right answer is known.
        by_expert: whether the expert wrote it in the student's place; absent: the student did.
        finished: whether it ended itself (else the token limit did).
        teacher: what the self-teacher read; null: the same as the student.
        note: what the context says of the attempt.
        wrong: how many wrong hints the context gave.
        teaches: whether something was learned from it.
        reward: its reward; null where no right answer is known.
        group_advantage: reward against the group's; null where there is no group.
        mean_abs_advantage: mean of abs(A_t) over tokens; null without a teacher.
        negative_advantage: share of tokens with negative A_t; null without a teacher.
        entropy: mean entropy in nats.
        logprob: mean log-probability of its tokens.
        logprob_gap: largest difference of a token's log-probability from when it was drawn.
    """

    attempt: int
    id: str
    question: str
    reference: str | None
    text: str
    thought: NotRequired[str]
    tokens: list[int]
    final: str | None
    correct: bool | None
    by_expert: NotRequired[bool]
    finished: bool
    teacher: str | None
    note: str
    wrong: int
    teaches: bool
    reward: float | None
    group_advantage: float | None
    mean_abs_advantage: float | None
    negative_advantage: float | None
    entropy: float | None
    logprob: float | None
    logprob_gap: float


class HeldOutRow(TypedDict):
    """Held-out problems answered right.

    Attributes:
        before: before the first update.
        after: at the run's end.
    """

    before: ShareRow
    after: ShareRow


class SelfUpdatesRow(TypedDict):
    """The optimiser steps of a run of self-distillation.

    Attributes:
        batches: batches with at least one.
        steps: how many.
        skipped: those that were not finite and changed nothing.
        tokens: tokens read in them.
        clipped: mean share of clipped tokens; null where there was no step.
    """

    batches: int
    steps: int
    skipped: int
    tokens: int
    clipped: float | None


@final
class SelfHeadroomRow(TypedDict):
    """``headroom.json``: the headroom check of self-distillation.

    Attributes:
        problems: held-out problems.
        right: answered right; null where no right answer is known, as are the next but ``taught``.
        mixed: with right and with wrong attempts.
        taught: with an attempt that the self-teacher has something to read about.
        without: of those, answered right without the context.
        with_context: of those, answered right with it.
        expert: problems that the expert answers right, where it is the teacher.
        seconds: what the check took.
    """

    problems: int
    right: int | None
    mixed: int | None
    taught: int
    without: int | None
    with_context: int | None
    expert: NotRequired[int]
    seconds: NotRequired[float]


class SelfHealthRow(TypedDict):
    """How near student and teacher came.

    Attributes:
        first: over the first quarter of the batches.
        last: over the last quarter.
    """

    first: HealthRow
    last: HealthRow


class SelfSummary(TypedDict):
    """``summary.json`` of self-distillation.

    Attributes:
        attempts: statistics of the student's attempts, or of the expert's where it wrote all; null
            where there are none.
        expert_answers: what the expert wrote in the student's place; absent: nothing.
        health: how near student and teacher came; absent where no teacher read attempts.
        first_half: the student's attempts right in the first half.
        second_half: in the second half.
        held_out: held-out problems answered right.
        probe: the share of held-out problems answered wrong; empty where that is not known.
        headroom: the headroom check; null where it is not known any more.
        updates: the optimiser steps.
        tokens: tokens of the attempts, and tokens read for them.
        seconds: seconds by step, and in ``total``.
        best_checkpoint: name of the checkpoint with the fewest wrong answers; the last one where
            no right answer is known.
        peak_memory_bytes: most memory of MLX in any of the run's processes.
    """

    attempts: AttemptsRow | None
    expert_answers: NotRequired[ExpertAnswersRow]
    health: NotRequired[SelfHealthRow]
    first_half: ShareRow
    second_half: ShareRow
    held_out: HeldOutRow
    probe: ProbeLossesRow
    headroom: SelfHeadroomRow | None
    updates: SelfUpdatesRow
    tokens: Mapping[str, float]
    seconds: Mapping[str, float]
    best_checkpoint: NotRequired[str]
    peak_memory_bytes: NotRequired[float]
