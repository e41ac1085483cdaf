"""What a run's episodes came to, and the texts that are learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict, final

from mlx_fd.runs.records.parts import ThoughtColumns


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
