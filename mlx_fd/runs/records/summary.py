"""What a run came to: ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict, final

from mlx_fd.runs.records.metrics import TrustRow, WorkRow
from mlx_fd.runs.records.parts import (
    BeforeAfterRow,
    CountRow,
    EstimateRow,
    ProbeLossesRow,
    ShareRow,
)
from mlx_fd.runs.records.self_distillation import SelfSummary


class AccuracyRow(TypedDict):
    """How many answers were right, of those of which it is known: none where there is no gold.

    Attributes:
        first_answers: of the first answers.
        final_answers: of the final answers.
    """

    first_answers: ShareRow
    final_answers: ShareRow


class VerdictsRow(TypedDict):
    """What is known of answers without gold: the models' verdicts (a score above 0: good).

    Attributes:
        first_answers: first answers that are good by the expert's verdict, of those with one.
        agreement: the student's verdicts that are the expert's, of the answers with both.
        kept: first answers that were left as they were, since their score reached the target.
        revised: those that were revised, or checked and finished anew.
    """

    first_answers: ShareRow
    agreement: ShareRow
    kept: int
    revised: int


class ScoreGapRow(TypedDict):
    """Mean of abs(expert's written score - student's head score).

    Attributes:
        first_half: over the first half of the scored episodes; null where there are none.
        second_half: over the second half.
        n: scored episodes.
    """

    first_half: float | None
    second_half: float | None
    n: int


class CalibrationBinRow(TypedDict):
    """A bin of a calibration curve.

    Attributes:
        low: the least probability in it.
        high: the largest.
        n: answers.
        probability: the mean probability, by the score, that the answer is right.
        right: the share that the expert called right.
    """

    low: float
    high: float
    n: int
    probability: float
    right: float


class ReliabilityRow(TypedDict):
    """What a score of the student's says of the expert's verdict.

    Attributes:
        n: answers that both scored.
        brier: Brier score of (1 + score) / 2; null where there is none.
        brier_interval: its 95 % interval; not there in runs of older versions.
        auc: area under the ROC curve; null where the expert called all answers the same.
        auc_interval: likewise.
        curve: the calibration curve, of the bins with answers.
    """

    n: int
    brier: float | None
    brier_interval: NotRequired[list[float] | None]
    auc: float | None
    auc_interval: NotRequired[list[float] | None]
    curve: list[CalibrationBinRow]


class JudgingRow(TypedDict):
    """The student's scores in the second half of the scored episodes, before it learned from each.

    Attributes:
        head: its score head's.
        written: the score in its text.
    """

    head: ReliabilityRow
    written: ReliabilityRow


class UpdatesRow(TypedDict):
    """A run's optimiser steps.

    Attributes:
        batches: batches with at least one.
        steps: how many.
        skipped: those that were not finite and changed nothing.
        tokens: tokens read in them.
        frozen_after_batch: number (from 1) of the batch after which the gate had stopped for good;
            null where it did not.
    """

    batches: int
    steps: int
    skipped: int
    tokens: int
    frozen_after_batch: int | None


class AuditsRow(TypedDict):
    """Episodes in which the student needed no expert, and the expert was asked all the same.

    Attributes:
        n: how many.
        disagreed: those in which the verdicts differed.
        interval: of that share, 95 % (Wilson).
    """

    n: int
    disagreed: int
    interval: list[float]


class ExpertUseRow(TypedDict):
    """How much the expert's feedback was used.

    Attributes:
        asked: episodes with it.
        not_asked: episodes in which the student stood alone.
        tokens_written: tokens of the expert's feedbacks.
        tokens_saved: estimate: mean length times ``not_asked``.
        share_saved: of the tokens written and saved, those saved; null before the first batch.
        share_saved_second_half: the same in the second half of the episodes.
        audits: episodes in which the student needed no expert, and the expert was asked.
        trust: where the student needs no expert, at the end; null before the first batch.
        accuracy_when_asked: final answers right where it was asked.
        accuracy_when_not_asked: where it was not.
    """

    asked: int
    not_asked: int
    tokens_written: int
    tokens_saved: int
    share_saved: float | None
    share_saved_second_half: float | None
    audits: AuditsRow
    trust: TrustRow | None
    accuracy_when_asked: ShareRow
    accuracy_when_not_asked: ShareRow


class UnreadableRow(TypedDict):
    """Feedbacks in which no written score could be read.

    Attributes:
        expert: of the expert's.
        student: of the student's.
    """

    expert: int
    student: int


class ExpertVerdictsRow(TypedDict):
    """The expert's scores against the right answers.

    Attributes:
        known: scores on answers of which it is known whether they are right.
        contradicted: those that were above 0 on a wrong answer or below 0 on a right one.
        left_out: of them, those whose feedback was not learned from.
        asked_again: of them, those for which the feedback of an expert that was told the right
            answer was learned from.
    """

    known: int
    contradicted: int
    left_out: int
    asked_again: int


class TopKRow(TypedDict):
    """What keeping the expert's k likeliest tokens leaves out.

    Attributes:
        k: how many are kept.
        tail_mass: mean probability of all others.
        missing_at_most: bound of what the logit loss misses; null where it is unknown.
    """

    k: int
    tail_mass: float
    missing_at_most: float | None


class AcceptanceRow(TypedDict):
    """Of tokens that the expert wrote with a draft, the share that the student had proposed.

    The intervals are over episodes: the tokens of one are alike.

    Attributes:
        whole: in all episodes.
        first_half: in the first half of those in which there were some.
        second_half: in the second half.
    """

    whole: EstimateRow
    first_half: EstimateRow
    second_half: EstimateRow


class HeadroomVerdictsRow(TypedDict):
    """The headroom check without gold: by the models' verdicts (a score above 0: good).

    Attributes:
        expert: answers of the expert that are good by its own verdict, of those with one.
        student: answers of the student that are good by the expert's verdict, likewise.
        agreement: the student's verdicts on first answers that are the expert's, of those with
            both.
    """

    expert: CountRow
    student: CountRow
    agreement: CountRow


@final
class HeadroomJudgedRow(TypedDict):
    """The headroom check's judging, of wrong and of right answers apart.

    Attributes:
        expert_on_wrong: wrong answers that the expert's score finds (0 or below), of those scored.
        expert_on_right: right answers that it passes (above 0), likewise.
        student_on_wrong: wrong answers that the student's written score finds, likewise.
        student_on_right: right answers that it passes, likewise.
    """

    expert_on_wrong: CountRow
    expert_on_right: CountRow
    student_on_wrong: CountRow
    student_on_right: CountRow


@final
class HeadroomRow(TypedDict):
    """The headroom check of the loop: counts on the probe problems, before any update.

    Attributes:
        problems: how many there were.
        expert_right: problems the expert answers right; null where no right answer is known.
        student_right: problems the student answers right; null likewise.
        expert_judged: answers with a readable written score of the expert.
        expert_judged_right: those it judged well; null likewise.
        student_judged: answers with a readable written score of the student.
        student_judged_right: those it judged well; null likewise.
        verdicts: in their place, where no right answer is known.
        judged: where one is, the judged answers that are wrong and that are right, apart; absent in
            older runs.
    """

    problems: int
    expert_right: int | None
    student_right: int | None
    expert_judged: int
    expert_judged_right: int | None
    student_judged: int
    student_judged_right: int | None
    verdicts: NotRequired[HeadroomVerdictsRow]
    judged: NotRequired[HeadroomJudgedRow]


class Summary(TypedDict):
    """``summary.json`` of the loop: a run's totals.

    Attributes:
        episodes: how many.
        accuracy: answers right.
        verdicts: the models' verdicts on the answers, where no right answer is known.
        probe: losses on the probe set.
        headroom: the headroom check; null where it is not known any more.
        score_gap: distance between the two models' scores.
        judging: how well the student's scores tell what the expert says; null where it scored none.
        updates: the optimiser steps.
        expert_feedback: how much the expert was asked.
        unreadable_scores: feedbacks without a readable score.
        expert_verdicts: the expert's scores against the right answers; absent in older runs.
        tokens: tokens written, by step.
        prefilled: tokens read, by step.
        seconds: seconds by step, and in ``total``.
        top_k: with ``teacher_top_k``: what is left out.
        exam: with an examination: each measure before and after; before is before the warm-up.
        warm_up: with a warm-up: its own totals.
        work: with ``profile``: what its batches did beside the least there could have been.
        acceptance: with ``speculate``: how much of what the expert wrote the student had proposed,
            by step, and of all steps in ``all``.
        best_checkpoint: name of the checkpoint with the least probe losses.
        peak_memory_bytes: most memory of MLX in any of the run's processes.
    """

    episodes: int
    accuracy: AccuracyRow
    verdicts: NotRequired[VerdictsRow]
    probe: ProbeLossesRow
    headroom: HeadroomRow | None
    score_gap: ScoreGapRow
    judging: NotRequired[JudgingRow | None]
    updates: UpdatesRow
    expert_feedback: ExpertUseRow
    unreadable_scores: UnreadableRow
    expert_verdicts: NotRequired[ExpertVerdictsRow]
    tokens: Mapping[str, float]
    prefilled: Mapping[str, float]
    seconds: Mapping[str, float]
    top_k: NotRequired[TopKRow]
    exam: NotRequired[dict[str, BeforeAfterRow]]
    warm_up: NotRequired[SelfSummary]
    work: NotRequired[WorkRow]
    acceptance: NotRequired[Mapping[str, AcceptanceRow]]
    best_checkpoint: NotRequired[str]
    peak_memory_bytes: NotRequired[float]
