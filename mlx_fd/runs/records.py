"""Every row and file that a run, an evaluation or an export leaves, declared once.

They are plain JSON objects: a writer makes one, mypy checks its keys, a reader gets the same type.
``docs/reference.md`` lists them (``scripts/make_reference.py`` takes the text from the docstrings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, final

SCHEMA_VERSION = 1
"""Of the rows of a run, in its manifest. It changes where a key does; mlx-fd 0.2 wrote none."""


# ------------------------------------------------------------------------------------- parts


class ShareRow(TypedDict):
    """A share of right ones.

    Attributes:
        right: how many were right.
        n: of how many.
        interval: 95 % Wilson interval of ``right / n``.
    """

    right: int
    n: int
    interval: list[float]


class EstimateRow(TypedDict):
    """A number with its interval.

    Attributes:
        value: the number; null where it is not defined.
        low: lower end of the 95 % interval; null where it is not known.
        high: upper end.
        n: items that it comes from.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


class BeforeAfterRow(TypedDict):
    """A measure before training and after it.

    Attributes:
        before: before the first update.
        after: at the run's end.
        change: after minus before, paired.
    """

    before: EstimateRow
    after: EstimateRow
    change: EstimateRow


class AnswerRow(TypedDict):
    """An answer.

    Attributes:
        text: as it was written.
        final: the final answer read in it, a number as a fraction; null where none could be read.
    """

    text: str
    final: str | None


class ExpertFeedbackRow(TypedDict):
    """The expert's feedback on an answer.

    Attributes:
        text: the paragraph, without its score.
        written_score: the score in the text, in [-1, 1]; null where none could be read.
    """

    text: str
    written_score: float | None


class StudentFeedbackRow(TypedDict):
    """The student's feedback on an answer.

    Attributes:
        text: the paragraph, without its score.
        head_score: its score head's score, in (-1, 1); null where no loss teaches the head.
        written_score: the score in the text, in [-1, 1]; null where none could be read.
        solves_alike: share of its own solutions that come to the answer's final; null where it
            gave none, or they cannot be compared.
        confidence: in its verdict, in [0, 1]; null where it has no score.
    """

    text: str
    head_score: float | None
    written_score: float | None
    solves_alike: float | None
    confidence: float | None


class GateRow(TypedDict):
    """What the gate decided on a sample.

    Attributes:
        distilled: whether the student was to learn from it.
        reason: why, in words and numbers.
        trusted: whether the student needed no expert here; where it was asked all the same, that
            was an audit.
        on_policy: whether the text was the student's own feedback; absent where the expert was not
            asked, as are the losses.
        losses_before: the student's losses on the sample before the update, by name; null where
            not finite.
        losses_after: the same after it; null without ``measure_after``, or where nothing was
            learned.
    """

    distilled: bool
    reason: str
    trusted: bool
    on_policy: NotRequired[bool]
    losses_before: NotRequired[Mapping[str, float | None]]
    losses_after: NotRequired[Mapping[str, float] | None]


class VerdictRow(TypedDict):
    """The expert's score against the right answer.

    Attributes:
        outcome: ``agrees``; ``unknown`` where the right answer is not known or no score could be
            read; else it contradicts the right answer and was ``kept``, ``left out``, or the expert
            was told the right answer: ``asked again``, or ``wrong again`` or ``leaks`` where that
            is left out, too.
        again: its feedback when it was told, which nothing but the training sees; null where it
            was not.
    """

    outcome: str
    again: ExpertFeedbackRow | None


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


class ThoughtColumns(TypedDict, total=False):
    """Of models that think before they write; absent where nothing was thought.

    Attributes:
        thoughts: what was thought before a text, by step.
        closed_thoughts: steps whose thought was closed at its token limit.
    """

    thoughts: Mapping[str, str]
    closed_thoughts: list[str]


def thought_columns(thoughts: Mapping[str, str], closed: Sequence[str]) -> ThoughtColumns:
    """The columns of what was thought, and of the steps whose thought was closed."""
    columns: ThoughtColumns = {}
    if thoughts:
        columns["thoughts"] = thoughts
    if closed:
        columns["closed_thoughts"] = list(closed)
    return columns


class AcceptedColumns(TypedDict, total=False):
    """Of texts that were written with a draft (``speculate``); absent where none was.

    Attributes:
        accepted: tokens that the student had proposed, by step, of those in ``tokens``.
    """

    accepted: Mapping[str, int]


def accepted_columns(accepted: Mapping[str, int]) -> AcceptedColumns:
    """The column of what a draft proposed."""
    return {"accepted": accepted} if accepted else {}


class SolutionColumns(TypedDict, total=False):
    """Of what the student alone found right; absent where the expert solved nothing.

    Attributes:
        expert_solution: the expert's own, by which it checked the answer.
    """

    expert_solution: AnswerRow


class SecondRow(TypedDict):
    """With ``answers_by`` ``both``: the student's answer to the problem, judged to learn from.

    Attributes:
        answer: the answer.
        correct: whether it is right; null where that is not known.
        expert_feedback: the expert's.
        student_feedback: the student's own.
        gate: what the gate decided.
        verdict: what was made of the expert's score of it, where that is known to be wrong.
    """

    answer: AnswerRow
    correct: bool | None
    expert_feedback: ExpertFeedbackRow | None
    student_feedback: StudentFeedbackRow
    gate: GateRow
    verdict: VerdictRow | None


# ------------------------------------------------------------------------------- rows of logs


@final
class EpisodeRow(ThoughtColumns, AcceptedColumns, SolutionColumns):
    """A line of ``episodes.jsonl``: one problem.

    Attributes:
        episode: its index in the run, from 0.
        id: the problem's.
        question: the problem's text.
        reference: the right answer, a number as a fraction; null where it is not known.
        answer: the first answer.
        expert_feedback: the expert's; null where the student stood alone.
        student_feedback: the student's, before it learned from this batch.
        student_feedback_again: what it said after it learned, and what was merged; null where it
            did not learn, or ``order`` is ``learn-last``.
        gate: what the gate decided.
        verdict: the expert's score against the right answer; null where it was not asked, absent
            in runs of older versions.
        score: the combined score of the first answer; null where the expert's could not be read, or
            neither model gave one.
        merged: the feedback that the revision follows; empty where none was needed.
        revised: the revised answer's text; empty where the first answer stayed, or was found right
            by the student alone and criticised by the expert.
        critique: the expert's critique of its revision, or of what the student alone found right;
            empty where the first answer stayed.
        final: the final answer.
        correct_before: whether the first answer was right; null where no right answer is known.
        correct_after: whether the final answer was right; null likewise.
        tokens: tokens written, by step.
        prefilled: tokens read, by step.
        capped: steps that ended at the token limit.
        seconds: this problem's share of the batch's time, by step.
        second: with ``answers_by`` ``both``, the student's answer; null else, and where the student
            is frozen. Its steps are in the other columns, each name after ``second_``.
    """

    episode: int
    id: str
    question: str
    reference: str | None
    answer: AnswerRow
    expert_feedback: ExpertFeedbackRow | None
    student_feedback: StudentFeedbackRow
    student_feedback_again: StudentFeedbackRow | None
    gate: GateRow
    verdict: NotRequired[VerdictRow | None]
    score: float | None
    merged: str
    revised: str
    critique: str
    final: AnswerRow
    correct_before: bool | None
    correct_after: bool | None
    tokens: Mapping[str, int]
    prefilled: Mapping[str, int]
    capped: list[str]
    seconds: Mapping[str, float]
    second: SecondRow | None


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


class SampleRow(TypedDict):
    """A sample of ``probe.json`` and ``samples.jsonl``: a text to learn from.

    Attributes:
        prompt: token ids before the text.
        target: token ids of the text.
        expert_score: the expert's written score; null where none could be read.
        on_policy: whether the text is the student's own feedback.
        answer: of a solution, for each token whether it writes some of the final answer.
        steps: of a solution, what each token counts in its step of the reasoning.
        matched: where the models have different tokenizers, for each token whether the expert has
            the same at the same place.
        expert_prompt: likewise, and where the expert was told the right answer, its token ids
            before the text.
        expert_target: likewise, its token ids of the text.
        own: with ``score_at`` ``own``, the student's token ids up to the end of its own feedback.
    """

    prompt: list[int]
    target: list[int]
    expert_score: float | None
    on_policy: bool
    answer: list[bool]
    steps: list[float]
    matched: NotRequired[list[bool]]
    expert_prompt: NotRequired[list[int]]
    expert_target: NotRequired[list[int]]
    own: NotRequired[list[int]]


class LoggedSampleRow(SampleRow):
    """A line of ``samples.jsonl``.

    Attributes:
        batch: the batch in which the sample was made.
    """

    batch: int


# -------------------------------------------------------------------------------- a run's files


class ModelRow(TypedDict):
    """A model of a run; empty texts where there is none.

    Attributes:
        name: as it was named.
        path: where it was.
        sha256: of its content.
        fingerprint: how the digest was made.
    """

    name: str
    path: str
    sha256: str
    fingerprint: NotRequired[int | str]


class ProblemsRow(TypedDict):
    """The problems of a run.

    Attributes:
        name: of the source.
        split: of it.
        sha256: of all problems that the run's were drawn from.
        skipped_rows: rows of the source that were no problems.
        kind: of their answers; absent: number.
    """

    name: str
    split: str
    sha256: str
    skipped_rows: Any
    kind: NotRequired[str]


class LearnedRow(TypedDict):
    """Problems that an earlier run's student learned from.

    Attributes:
        name: of the source; a file's whole path.
        split: of it.
        columns: what its columns stand for, where they were named.
        sha256: of all problems of the source; of a file, of its bytes.
    """

    name: str
    split: str
    columns: str
    sha256: str


class ChatTemplateRow(TypedDict):
    """How chats are written for a run's student, beside the options that say so, too.

    Attributes:
        source: the template, in Jinja.
        special_tokens: texts by the name that the template has for them.
        end_tokens: ids of the tokens that end a turn.
        sha256: of the three as JSON.
    """

    source: str
    special_tokens: dict[str, str]
    end_tokens: list[int]
    sha256: str


class Manifest(TypedDict):
    """``manifest.json``: what a run was made of.

    Attributes:
        schema_version: of the run's rows.
        created: when, in UTC.
        versions: of Python, the system, mlx-fd and the packages that numbers depend on.
        backend: device, BLAS, threads and cores.
        seed: of all draws.
        expert: the expert; of self-distillation, the critic.
        student: the student's base model.
        problems: where the problems come from.
        shared_vocabulary: tokens that student and expert share; 0: they have different tokenizers.
        chat_template: how chats are written; runs of older versions have none.
        options: every option by name.
        learned_before: with ``--continue``, what the student had learned from: the earlier run's
            problems, and those of the runs before it; runs of older versions have none.
        ranks: how many processes make the run, where it is more than one.
    """

    schema_version: int
    created: str
    versions: dict[str, str]
    backend: dict[str, Any]
    seed: int
    expert: ModelRow
    student: ModelRow
    problems: ProblemsRow
    shared_vocabulary: int
    chat_template: NotRequired[ChatTemplateRow]
    options: dict[str, Any]
    learned_before: NotRequired[list[LearnedRow]]
    ranks: NotRequired[int]


class ProbeLossesRow(TypedDict):
    """Losses on the probe set, by name.

    Attributes:
        before: before the first update.
        after: at the run's end.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]


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


class CountRow(TypedDict):
    """So many of so many.

    Attributes:
        count: how many.
        n: of how many.
    """

    count: int
    n: int


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


class ExamResultRow(TypedDict):
    """What the student made of one question of the examination.

    Attributes:
        wrong: whether the answer to judge had an error.
        score_error: abs(head score - the score it deserves).
        written_error: abs(written score - the score it deserves).
        readable: whether a score and a verdict on the steps could be read.
        found: whether the first wrong step it names is the truth.
        solved: whether its own solution is right.
    """

    wrong: bool
    score_error: float
    written_error: float
    readable: bool
    found: bool
    solved: bool


class ExamFile(TypedDict):
    """``exam_before.json`` and ``exam_after.json``.

    Attributes:
        seconds: what the examination took.
        results: one for each question.
        exam_sha256: of the questions, the token limits, and who took it; absent in older versions.
    """

    seconds: float
    results: list[ExamResultRow]
    exam_sha256: NotRequired[str]


class TrackerRow(TypedDict):
    """Of ``tracking.json``, which has one for each tracker: what it has of the run.

    Attributes:
        id: the run's id there.
        step: the last step that was written to it; -1: none.
    """

    id: str
    step: int


# ----------------------------------------------------------------------------- evaluation's files


class TrialRow(ThoughtColumns):
    """What every line of ``outputs.jsonl`` has of a system's attempt.

    Attributes:
        turns: what was written, by step.
        last: the step whose text is the final answer.
        score: the score that the first answer was given; null where there is none.
        tokens: tokens written, by step.
        prefilled: tokens read, by step.
        seconds: this problem's share of the batch's time, by step.
        by: whose tokens they are, by step.
        capped: steps that ended at the token limit.
    """

    turns: dict[str, str]
    last: str
    score: float | None
    tokens: dict[str, int]
    prefilled: dict[str, int]
    seconds: dict[str, float]
    by: dict[str, str]
    capped: list[str]


class ItemRow(TypedDict):
    """What a set says of an item; which of the later fields it has, the kind of set decides.

    Attributes:
        id: the problem's.
        question: the problem's text.
        reference: the right answer, the first wrong step, or the reference text; empty where there
            is none.
        final: what was read in the final text; null where nothing could be.
        correct: whether that is right; null where nothing is right or wrong.
        strict: whether lm-evaluation-harness's strict filter finds it right; null likewise, and
            where no reply can match the gold answer: it is no number, or has a unit, % or a slash.
        flexible: whether its flexible filter does; null likewise.
        first_correct: whether the first answer was right; null likewise.
        deserved: the score that the judged answer deserves.
        written_score: the score in the feedback's text; null where none could be read.
        expert_score: the score in the expert's feedback on the same answer; null likewise.
    """

    id: str
    question: str
    reference: str
    final: str | None
    correct: bool | None
    strict: NotRequired[bool | None]
    flexible: NotRequired[bool | None]
    first_correct: NotRequired[bool | None]
    deserved: NotRequired[float]
    written_score: NotRequired[float | None]
    expert_score: NotRequired[float | None]


class OutputRow(ItemRow, TrialRow):
    """A line of ``outputs.jsonl``: one trial.

    Attributes:
        set: name of the set.
        system: name of the system.
        sample: index of the sample, from 0.
    """

    set: str
    system: str
    sample: int


class CostsRow(TypedDict):
    """What a system cost.

    Attributes:
        cost: means per problem, by name.
        cost_estimates: the same with intervals.
    """

    cost: dict[str, float]
    cost_estimates: dict[str, EstimateRow]


class SystemRow(CostsRow):
    """A system of an evaluation set.

    Attributes:
        name: its name.
        label: what tables call it.
        measures: by name.
    """

    name: str
    label: str
    measures: dict[str, EstimateRow]


class DifferenceRow(TypedDict):
    """The difference of two systems in a measure.

    Attributes:
        difference: first minus other.
        p: two-sided; null where there was no test.
        test: the test's name.
    """

    difference: EstimateRow
    p: float | None
    test: str


class PairRow(DifferenceRow):
    """The difference, and of what.

    Attributes:
        measure: what is compared.
        system: the first system.
        against: the other.
    """

    measure: str
    system: str
    against: str


class ComparisonRow(PairRow):
    """Two systems on the same problems.

    Attributes:
        p_holm: p after Holm's correction over the set.
    """

    p_holm: float | None


class EvaluationSetRow(TypedDict):
    """A set of an evaluation.

    Attributes:
        name: its name.
        n: its items.
        systems: what each got.
        comparisons: the first system against each other one.
    """

    name: str
    n: int
    systems: list[SystemRow]
    comparisons: list[ComparisonRow]


class EvaluationFile(TypedDict):
    """``eval.json``.

    Attributes:
        format: of the file.
        target: what was evaluated.
        suite: the suite's name.
        asked: all that tells it from another evaluation.
        created: when, in UTC.
        versions: as in the manifest.
        models: name and digest of each model.
        seed: of all draws.
        k: samples of each problem.
        temperature: of first and of bare answers.
        answers_by: who gave the first answers.
        stands_alone: whether the student stood alone where it was confident enough.
        text_models: the models that measured texts.
        sets: the results.
    """

    format: int
    target: str
    suite: str
    asked: dict[str, Any]
    created: str
    versions: dict[str, str]
    models: dict[str, dict[str, str]]
    seed: int
    k: int
    temperature: dict[str, float]
    answers_by: str
    stands_alone: bool
    text_models: dict[str, str]
    sets: list[EvaluationSetRow]


class RealStopRow(TypedDict):
    """With ``mlx-fd pareto --sweep``: what became of a threshold's own run.

    Attributes:
        run: its directory, within the run's.
        stopped_after_batch: where it stopped; null: it did not.
        kd_steps: optimiser steps until then.
        as_predicted: whether these, and the losses there, are those of the replay.
        thawed_after_batch: where it went on learning; null: it did not.
        final_accuracy: final answers right over all episodes; its value is null where no right
            answer is known.
    """

    run: str
    stopped_after_batch: int | None
    kd_steps: int
    as_predicted: bool
    thawed_after_batch: int | None
    final_accuracy: EstimateRow


class ParetoPointRow(TypedDict):
    """A stopping threshold, replayed on a run.

    Attributes:
        stop_threshold: the threshold.
        thresholds: the interval of thresholds with the same stop.
        stopped_after_batch: where it stops; null: it does not.
        cost: by name.
        losses: on the probe set at that point.
        metrics: further measures, without their intervals.
        estimates: the same with intervals.
        dominated: whether another point is at least as good in everything.
        recommended: whether it is the one to take.
        real: with a sweep: what became of it.
    """

    stop_threshold: float
    thresholds: list[float]
    stopped_after_batch: int | None
    cost: Mapping[str, float]
    losses: Mapping[str, float]
    metrics: Mapping[str, float | None]
    estimates: Mapping[str, EstimateRow]
    dominated: bool
    recommended: bool
    real: NotRequired[RealStopRow]


class ParetoStartRow(TypedDict):
    """The student before the first update.

    Attributes:
        losses: on the probe set.
    """

    losses: Mapping[str, float]


class ParetoFile(TypedDict):
    """``pareto.json``.

    Attributes:
        format: of the file.
        run: the run directory.
        batches: batches done.
        finished: whether the run came to its end.
        objectives: names, the cost first.
        start: the student before the first update.
        points: every distinct stop.
        hypervolume: of the frontier.
        reference: the reference point, as a share of each objective's worst.
        knee: threshold at the frontier's knee; null where it has none.
        product_rule: threshold by the product rule.
        notes: what there is to know of the recommendation.
    """

    format: int
    run: str
    batches: int
    finished: bool
    objectives: list[str]
    start: ParetoStartRow
    points: list[ParetoPointRow]
    hypervolume: float | None
    reference: float
    knee: float | None
    product_rule: float | None
    notes: list[str]


# --------------------------------------------------------------------------------------- cascade


class CascadePromiseRow(TypedDict):
    """What a cascade's threshold promises.

    Attributes:
        kind: ``risk``: of wrong answers among those that the student keeps; ``accuracy``: of all
            answers; ``cost``: the share of requests that the expert is asked.
        target: at most this risk or cost, at least this accuracy.
        level: the probability with which it holds on problems like the calibration's.
        threshold: answers with at least this score stay the student's; null: all are passed on.
        against: problems that count against it: wrong ones, for a cost those passed on.
        of: of how many.
        bound: what the promised share surely does not pass; null where nothing is known.
        kept: whether a threshold keeps it.
        least_risk: of a risk for which nothing can be kept: the least one, in whole per cent, that
            these problems allow to promise; null: none.
        problems_needed: likewise: about how many problems it takes, if others come out as these
            did; null: more than ten times as many.
    """

    kind: str
    target: float
    level: float
    threshold: float | None
    against: int
    of: int
    bound: float | None
    kept: bool
    least_risk: NotRequired[float | None]
    problems_needed: NotRequired[int | None]


class CascadeStepRow(TypedDict):
    """What scores mean, from one score to the next.

    Attributes:
        score: the lowest of the step.
        right: the share of right answers in it.
        n: answers in it.
    """

    score: float
    right: float
    n: int


class CascadePointRow(TypedDict):
    """A cascade that passes on a share of problems: those of the lowest scores.

    Attributes:
        passed_on: the share.
        threshold: of the score; null where all are passed on.
        accuracy: of all answers.
        random: the accuracy where as many are passed on by lot.
        oracle: the best accuracy with as many.
        expert_tokens: that the expert writes, per problem.
    """

    passed_on: float
    threshold: float | None
    accuracy: float
    random: float
    oracle: float
    expert_tokens: float


class CascadeSystemRow(TypedDict):
    """A cascade at its threshold, or what it is held against.

    Attributes:
        name: ``student`` (never asks), ``cascade``, ``random`` and ``oracle`` (ask as often), and
            ``expert`` (is always asked).
        accuracy: of all answers.
        passed_on: the share of problems that the expert is asked.
        expert_tokens: that the expert writes, per problem.
    """

    name: str
    accuracy: EstimateRow
    passed_on: float
    expert_tokens: EstimateRow


class CascadeMeasuredRow(TypedDict):
    """A cascade on some problems.

    Attributes:
        problems: source and split.
        n: how many.
        created: when, in UTC.
        against: problems that count against the promise.
        of: of how many.
        above_random: area between accuracy and that of a lottery, over all shares passed on.
        systems: at the threshold.
        curve: over all thresholds.
        left_out: of an evaluation: problems of the source that it leaves out, since the threshold
            was set on their questions.
    """

    problems: str
    n: int
    created: str
    against: int
    of: int
    above_random: EstimateRow
    systems: list[CascadeSystemRow]
    curve: list[CascadePointRow]
    left_out: NotRequired[int]


class CascadeFile(TypedDict):
    """``cascade.json``.

    Attributes:
        format: of this file.
        models: name and digest of student, adapter and expert.
        score: what the student's answers were scored by: ``answer``, 1 / (1 - log p) of the answer,
            or ``head``, the score head's.
        promise: what its threshold promises.
        confidence: what scores mean, from the lowest on.
        ids: of the calibration's problems.
        questions: SHA-256 of each question of the calibration, runs of white space as one space: no
            evaluation uses it, under any id. Absent in calibrations of older versions.
        calibration: on those.
        evaluation: on others; null before ``mlx-fd cascade eval``.
    """

    format: int
    models: dict[str, dict[str, str]]
    score: str
    promise: CascadePromiseRow
    confidence: list[CascadeStepRow]
    ids: list[str]
    questions: NotRequired[list[str]]
    calibration: CascadeMeasuredRow
    evaluation: CascadeMeasuredRow | None


# --------------------------------------------------------------------------------- parity bundle


class BundlePromptRow(TypedDict):
    """A role's prompt of a parity bundle; its log-probabilities are in ``reference.safetensors``.

    Attributes:
        role: the turn: answer, feedback, merge, revise, critique or final.
        problem: the problem's id.
        text: the prompt as the chat template writes it.
        tokens: its token ids.
        greedy: token ids of the greedy continuation.
        begin: index of the first position that is kept.
    """

    role: str
    problem: str
    text: str
    tokens: list[int]
    greedy: list[int]
    begin: int


class BundleItemRow(TypedDict):
    """A problem of a parity bundle.

    Attributes:
        id: the problem's.
        question: its text.
        answer: the right answer.
        text: the model's greedy answer.
        final: the final answer read in it; null where none could be read.
        right: whether that is right; null where no right answer is known.
        kind: of the answer.
        choices: what there is to choose from.
        also_right: other right answers.
    """

    id: str
    question: str
    answer: str
    text: str
    final: str | None
    right: bool | None
    kind: str
    choices: list[str]
    also_right: list[str]


# Its key is the arrays' file: no name of a field.
_BundleDigest = TypedDict("_BundleDigest", {"reference.safetensors": "str"})


class BundleFile(_BundleDigest):
    """``parity/bundle.json``.

    Attributes:
        format: of the file.
        vocab: tokens that can be drawn.
        eos: ids of the end tokens.
        before: what the chat template writes before a message.
        after: what it writes after it.
        max_answer_tokens: maximum tokens of an answer.
        prompts: one for each role and problem.
        items: the problems.
        pieces: the text of tokens, by id.
        reference: the model and the machine that the bundle was made with.
        versions: of the packages.
        source: what was exported.
        reference.safetensors: digest of the file with the arrays.
    """

    format: int
    vocab: int
    eos: list[int]
    before: str
    after: str
    max_answer_tokens: int
    prompts: list[BundlePromptRow]
    items: list[BundleItemRow]
    pieces: dict[str, str]
    reference: dict[str, Any]
    versions: dict[str, str]
    source: dict[str, Any]


FILES: Mapping[str, tuple[type, ...]] = {
    "manifest.json": (Manifest, ModelRow, ProblemsRow, LearnedRow),
    "episodes.jsonl": (
        EpisodeRow,
        SecondRow,
        AnswerRow,
        ExpertFeedbackRow,
        StudentFeedbackRow,
        GateRow,
        VerdictRow,
    ),
    "metrics.jsonl": (MetricsRow, SelfMetricsRow, UpdateRow, StopRow, TrustRow, AttemptsRow),
    "attempts.jsonl": (AttemptRow,),
    "samples.jsonl and probe.json": (LoggedSampleRow,),
    "headroom.json": (SelfHeadroomRow,),
    "summary.json": (
        Summary,
        SelfSummary,
        AccuracyRow,
        HeldOutRow,
        ShareRow,
        ProbeLossesRow,
        HeadroomRow,
        ScoreGapRow,
        JudgingRow,
        ReliabilityRow,
        CalibrationBinRow,
        UpdatesRow,
        SelfUpdatesRow,
        ExpertUseRow,
        AuditsRow,
        UnreadableRow,
        ExpertVerdictsRow,
        VerdictsRow,
        TopKRow,
        BeforeAfterRow,
        EstimateRow,
    ),
    "exam_before.json and exam_after.json": (ExamFile, ExamResultRow),
    "tracking.json": (TrackerRow,),
    "outputs.jsonl": (OutputRow,),
    "eval.json": (EvaluationFile, EvaluationSetRow, SystemRow, ComparisonRow),
    "pareto.json": (ParetoFile, ParetoPointRow, RealStopRow, ParetoStartRow),
    "cascade.json": (
        CascadeFile,
        CascadePromiseRow,
        CascadeStepRow,
        CascadeMeasuredRow,
        CascadeSystemRow,
        CascadePointRow,
    ),
    "parity/bundle.json": (BundleFile, BundlePromptRow, BundleItemRow),
}
"""Each file with the types of what is in it, the outermost first."""
